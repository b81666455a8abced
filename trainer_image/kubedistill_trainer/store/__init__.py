"""S3 as the trainer sees it: one bucket and prefix, typed errors, bounded waiting."""

from kubedistill_trainer.store.client import Limits, ObjectInfo, Store, Upload
from kubedistill_trainer.store.errors import (
    AccessDenied,
    CredentialsMissing,
    InvalidStoreUri,
    NoSuchBucket,
    NotFound,
    PreconditionFailed,
    StoreError,
    StoreUnavailable,
    UnsupportedStore,
)
from kubedistill_trainer.store.preflight import preflight
from kubedistill_trainer.store.uri import S3Uri

__all__ = [
    "AccessDenied",
    "CredentialsMissing",
    "InvalidStoreUri",
    "Limits",
    "NoSuchBucket",
    "NotFound",
    "ObjectInfo",
    "PreconditionFailed",
    "S3Uri",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "UnsupportedStore",
    "Upload",
    "preflight",
]
