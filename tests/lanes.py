"""How pytest-xdist shares the tests out with `--dist loadfile`: file by file, but one lane for all files
that use one dev cluster, since each process has a cluster and an operator of its own."""

from __future__ import annotations

import os
from pathlib import Path

from devcluster.fixtures import OWN_CLUSTER
from xdist.scheduler import LoadFileScheduling

_FOLDERS = {"controlplane": "", "e2e": "from e2e.kit import"}
"""Folder of tests → the words in a file that say that it uses the folder's cluster."""
_APART = {"test_hands.py"}
"""Files of these folders that take long enough for a cluster of their own."""


class Lanes(LoadFileScheduling):
    """One process takes the next lane, whole, as soon as it is done with the one before."""

    def _split_scope(self, nodeid: str) -> str:
        return lane(nodeid.partition("::")[0])


def lane(file: str) -> str:
    """What the file is run together with. One that is taken for alone is so at the cost of a cluster."""
    path = Path(__file__).parents[1] / file
    words = _FOLDERS.get(path.parent.name)
    if words is None or words not in path.read_text():
        return file
    # Of two operators on one cluster a single one leads.
    if os.environ.get(OWN_CLUSTER):
        return OWN_CLUSTER
    return file if path.name in _APART else path.parent.name
