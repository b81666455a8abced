"""What a spec names by reference: models and files in S3, other jobs, Secrets."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from kubedistill_api.base import ApiModel

S3Uri = Annotated[
    str,
    StringConstraints(pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?$", max_length=1024),
]
ObjectName = Annotated[
    str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=50)
]
Preserved = Annotated[
    dict[str, Any],
    Field(json_schema_extra={"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
]


class JobReference(ApiModel):
    """Another DistillationJob of the same namespace, whose finished model is used."""

    name: ObjectName = Field(description="Name of a DistillationJob in the same namespace.")


class ModelSource(ApiModel):
    """A model folder in S3, in Hugging Face layout: config.json, *.safetensors, tokenizer.json."""

    uri: S3Uri = Field(description="Folder of a Hugging Face model with safetensors weights.")


class SecretReference(ApiModel):
    """A Secret of the same namespace."""

    # As the API server wants it in a pod: otherwise only the pods' Job would be refused.
    name: str = Field(
        min_length=1,
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
        description="Name of the Secret.",
    )
