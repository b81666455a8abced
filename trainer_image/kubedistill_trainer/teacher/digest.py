"""The digest of a teacher's folder without downloading its weights twice."""

from __future__ import annotations

import hashlib
import json

from kubedistill_api.runspec import ResolvedModel
from kubedistill_api.teacher import Endpoint

from kubedistill_trainer.store import Store


def teacher_digest(model: ResolvedModel, store: Store) -> str:
    """Digest that pins a teacher: the one its job recorded, or of the store's own entity tags.

    A folder that no job of ours made has no recorded digest. Reading 140 GB to hash it would cost
    more than the check is worth, so (name, size, ETag) of each file stand for its content: an
    object that is written again gets another ETag.
    """
    if model.digest:
        return model.digest
    facts = sorted((info.key, info.size_bytes, info.etag) for info in store.list(""))
    return "etags-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def endpoint_digest(endpoint: Endpoint) -> str:
    """Digest that pins a teacher behind a server: of the address and the name, all that is known.

    A server that begins to serve another model under the same name is not told apart.
    """
    facts = [endpoint.url.rstrip("/"), endpoint.model]
    return "endpoint-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()
