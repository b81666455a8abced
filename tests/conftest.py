"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes depends on what else the machine does: no statement about the code.
settings.register_profile("kubedistill", deadline=None, print_blob=True)
settings.load_profile("kubedistill")
