"""Methods that change, or only measure, a model without training it."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from kubedistill_api.runspec import Outcome

from kubedistill_trainer import exporter
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import Dataset, load_dataset
from kubedistill_trainer.finishing import Product, finish, tick_of
from kubedistill_trainer.methods.apart import changed
from kubedistill_trainer.methods.interruption import Interruption
from kubedistill_trainer.methods.shrink import shrink
from kubedistill_trainer.methods.student import StudentWithLoss
from kubedistill_trainer.methods.untrained import Untrained
from kubedistill_trainer.models import load
from kubedistill_trainer.report.evaluate import heldout_perplexity
from kubedistill_trainer.report.work import Work
from kubedistill_trainer.starting import download_teacher, loaded_student, signal_of, student_folder


def run_untrained(
    context: Context,
    board: exporter.ProgressBoard,
    interruption: Interruption,
    group: Any,
    local_rank: int,
) -> Outcome:
    """One rank, from its place in the gang to the exported model.

    Nothing is committed on the way: what is interrupted begins anew.
    """
    dataset = load_dataset(context.run, context.open_store)
    tick = tick_of(board, interruption)
    interruption.has_work()
    board.update(phase="Evaluating", last_step_time=time.time())
    model = loaded_student(context)
    whole = _untrained_engine(context, dataset, model, local_rank)
    measured = partial(heldout_perplexity, whole, dataset, context.rank, context.world_size, group)
    work, product, engine = Work(), None, whole
    spec = context.run.spec
    apart = spec.quantize or (spec.prune.unstructured if spec.prune is not None else None)
    if apart is not None:
        work = Work(initial_perplexity=measured(tick))
        product = Product(context.scratch / "export", load.parameter_count(model))
        source = student_folder(context)
        del model, whole, measured, engine
        board.update(phase="Compressing", last_step_time=time.time())
        changed(context, dataset, source, apart, product.folder, tick)
        dtype = load.dtype_of(spec.training.precision)
        model = load.load_model(product.folder, "the changed student", dtype)
        engine = _untrained_engine(context, dataset, model, local_rank)
    elif spec.prune is not None and spec.prune.structured is not None:
        initial = measured(tick)
        wanted, field = spec.prune.structured, "spec.prune.structured"
        board.update(phase="Compressing", last_step_time=time.time())
        model, cut = shrink(context, dataset, model, wanted, field, group, tick)
        engine = _untrained_engine(context, dataset, model, local_rank)
        work = Work(initial_perplexity=initial, cut=cut)
    else:
        parameters = load.parameter_count(model)
        product = Product(student_folder(context), parameters, context.run.student_model)
    teacher_folder = download_teacher(context)
    teacher = signal_of(context, dataset, teacher_folder, engine.device, None)
    try:
        return finish(context, dataset, engine, teacher, board, interruption, group, work, product)
    finally:
        teacher.close()


def _untrained_engine(context: Context, dataset: Dataset, model: Any, local_rank: int) -> Untrained:
    module = StudentWithLoss(model, None, dataset.tokenizer.vocab_size)
    return Untrained(module, context.rank, local_rank)
