"""What each layer, head and channel of a model adds, on calibration data.

Heads and FFN channels (after Minitron, arXiv 2407.14679, which takes the norm of their activations
alone): the root of the mean square of what they add to the hidden state, ‖W_out,i · a_i‖₂, W_out,i
being the columns of the output projection that they feed. Channels of the hidden state, as there:
the root over tokens of the mean square of the norms' outputs, summed over the norms. Layers (ShortGPT,
arXiv 2403.03853): block influence, 1 − mean cosine of what goes in and what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kubedistill_trainer.compress.architecture import Architecture
from kubedistill_trainer.compress.calibration import Batch, working_on
from kubedistill_trainer.compress.sizes import Sizes
from kubedistill_trainer.losses.types import IGNORED
from kubedistill_trainer.models.decoder import final_hidden


@dataclass(frozen=True)
class Statistics:
    """Sums over the calibration tokens that have a label, of each layer first.

    `heads` [layers, heads, size, size]: second moments of the heads' outputs; `ffn` [layers, ffn]:
    squares of the inner activations; `normed` [layers · norms + 1, hidden]: squares of the norms'
    outputs, the last norm's last; `raw` the same of their inputs; `turned` [layers]: 1 − cosine of
    each layer's input and output; `tokens`: how many. All but `tokens` in float64.
    """

    heads: Tensor
    ffn: Tensor
    normed: Tensor
    raw: Tensor
    turned: Tensor
    tokens: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them, to be summed over ranks."""
        return [self.heads, self.ffn, self.normed, self.raw, self.turned, self.tokens]


def empty(architecture: Architecture, sizes: Sizes, device: torch.device) -> Statistics:
    """Of no token."""
    norms = sizes.layers * len(architecture.norms) + 1

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    return Statistics(
        heads=zeros(sizes.layers, sizes.heads, sizes.head_size, sizes.head_size),
        ffn=zeros(sizes.layers, sizes.ffn),
        normed=zeros(norms, sizes.hidden),
        raw=zeros(norms, sizes.hidden),
        turned=zeros(sizes.layers),
        tokens=zeros(1),
    )


@torch.no_grad()
def collect(
    model: Any,
    architecture: Architecture,
    sizes: Sizes,
    batches: Iterable[Batch],
    tick: Callable[[], None] = lambda: None,
    device: torch.device | None = None,
) -> Statistics:
    """One pass of the model over the batches, on `device` (by default the model's); the model is left
    as it was. The sums are on the CPU."""
    device = device or next(model.parameters()).device
    found = empty(architecture, sizes, device)
    decoder = model.get_decoder()
    training = model.training
    model.eval()
    counted = _Counted()
    with _watched(decoder, architecture, found, counted), working_on(model, device):
        for tokens, positions, labels in batches:
            counted.rows_N = (labels.to(device) != IGNORED).flatten()
            final_hidden(decoder, tokens.to(device), positions.to(device))
            found.tokens.add_(counted.rows_N.sum())
            tick()
    model.train(training)
    return Statistics(*(tensor.cpu() for tensor in found.tensors()))


class _Counted:
    """Which positions of the batch that is read are counted."""

    rows_N: Tensor

    def of(self, values: Tensor) -> Tensor:
        """[B, L, channels] → [tokens that count, channels], in float32."""
        return values.flatten(0, -2)[self.rows_N].float()


@contextmanager
def _watched(
    decoder: Any, architecture: Architecture, into: Statistics, counted: _Counted
) -> Iterator[None]:
    with ExitStack() as stack:
        norms: list[nn.Module] = []
        for index, layer in enumerate(decoder.layers):
            heads = layer.get_submodule(architecture.attention_output)
            ffn = layer.get_submodule(architecture.ffn_output)
            for handle in (
                heads.register_forward_pre_hook(_heads_hook(into.heads[index], counted)),
                ffn.register_forward_pre_hook(_squares_hook(into.ffn[index], counted)),
                layer.register_forward_hook(_turn_hook(into.turned[index], counted)),
            ):
                stack.callback(handle.remove)
            norms += [layer.get_submodule(name) for name in architecture.norms]
        for index, norm in enumerate([*norms, decoder.norm]):
            hook = _norm_hook(into.raw[index], into.normed[index], counted)
            handle = norm.register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


def _heads_hook(into: Tensor, counted: _Counted) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heads_NHD = counted.of(inputs[0]).view(-1, *into.shape[:2])
        into.add_(torch.einsum("nhd,nhe->hde", heads_NHD, heads_NHD))

    return hook


def _squares_hook(into: Tensor, counted: _Counted) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        into.add_(_squares(counted.of(inputs[0])))

    return hook


def _norm_hook(raw: Tensor, normed: Tensor, counted: _Counted) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        raw.add_(_squares(counted.of(inputs[0])))
        normed.add_(_squares(counted.of(output)))

    return hook


def _turn_hook(into: Tensor, counted: _Counted) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        cosine = torch.cosine_similarity(counted.of(inputs[0]), counted.of(after), dim=-1)
        into.add_((1 - cosine.double()).sum())

    return hook


def _squares(values_NC: Tensor) -> Tensor:
    """Sums of squares over the tokens."""
    return values_NC.square().sum(0).double()


@dataclass(frozen=True)
class Scores:
    """What matters more has more. `heads` [layers, heads]; `ffn` [layers, ffn]; `hidden` [hidden];
    `layers` [layers]."""

    heads: Tensor
    ffn: Tensor
    hidden: Tensor
    layers: Tensor


@torch.no_grad()
def by_activation(model: Any, architecture: Architecture, found: Statistics) -> Scores:
    """By what is added to the hidden state."""
    tokens = found.tokens.clamp(min=1)
    heads, ffn = [], []
    for index, layer in enumerate(model.get_decoder().layers):
        out = layer.get_submodule(architecture.attention_output).weight.double().cpu()
        moments = found.heads[index]
        count, size = moments.shape[:2]
        out_HOD = out.view(out.shape[0], count, size).transpose(0, 1)
        added = torch.einsum("hod,hde,hoe->h", out_HOD, moments, out_HOD)
        heads.append((added.clamp(min=0) / tokens).sqrt())
        out = layer.get_submodule(architecture.ffn_output).weight.double().cpu()
        ffn.append((found.ffn[index] / tokens).sqrt() * out.norm(dim=0))
    hidden = (found.normed / tokens).sqrt().sum(0)
    return Scores(torch.stack(heads), torch.stack(ffn), hidden, found.turned / tokens)


@torch.no_grad()
def by_magnitude(model: Any, architecture: Architecture, sizes: Sizes) -> Scores:
    """By the norms of the weights of each head and channel; a layer by those of all of its own."""
    state = dict(model.named_parameters())
    squares: dict[str, list[Tensor]] = {"queries": [], "ffn": [], "layers": []}
    hidden = torch.zeros(sizes.hidden, dtype=torch.float64)
    for index in range(sizes.layers):
        sums = {
            "queries": torch.zeros(sizes.of("queries"), dtype=torch.float64),
            "ffn": torch.zeros(sizes.ffn, dtype=torch.float64),
            "hidden": hidden,
        }
        total = torch.zeros((), dtype=torch.float64)
        for name, axes in architecture.layer.items():
            weight = state.get(f"model.layers.{index}.{name}")
            if weight is None:
                continue
            square = weight.detach().cpu().double().square()
            total += square.sum()
            for place, axis in enumerate(axes):
                if axis in sums and len(axes) > 1:
                    sums[axis] += square.sum(1 - place)
        squares["queries"].append(sums["queries"].view(sizes.heads, sizes.head_size).sum(1))
        squares["ffn"].append(sums["ffn"])
        squares["layers"].append(total)
    return Scores(
        torch.stack(squares["queries"]).sqrt(),
        torch.stack(squares["ffn"]).sqrt(),
        hidden.sqrt(),
        torch.stack(squares["layers"]).sqrt(),
    )


def by_chance(sizes: Sizes, seed: int) -> Scores:
    """The same for the same seed on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    return Scores(
        drawn(sizes.layers, sizes.heads),
        drawn(sizes.layers, sizes.ffn),
        drawn(sizes.hidden),
        drawn(sizes.layers),
    )
