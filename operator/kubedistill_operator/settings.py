"""Settings of the operator: environment variables with the prefix KUBEDISTILL_, or a YAML file.

A variable wins over the file that KUBEDISTILL_SETTINGS_FILE names.
"""

from __future__ import annotations

import os
import socket
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)


def _identity() -> str:
    return f"{os.environ.get('POD_NAME') or socket.gethostname()}_{os.getpid()}"


class Settings(BaseSettings):
    """Everything about the operator that an administrator may change."""

    model_config = SettingsConfigDict(env_prefix="KUBEDISTILL_", frozen=True, extra="ignore")

    trainer_image: str = Field(
        "kubedistill-trainer:latest", description="Image of the trainer's containers."
    )
    trainer_image_pull_policy: str = Field(
        "", description="imagePullPolicy of the trainer's containers; empty leaves the default."
    )
    trainer_env: dict[str, str] = Field(
        {}, description="Variables that every trainer container gets, as a JSON object."
    )
    watch_namespaces: Annotated[list[str], NoDecode] = Field(
        [], description="Namespaces to look after, separated by commas; empty for all."
    )
    namespace: str = Field("default", description="The operator's own namespace: holds the Lease.")
    identity: str = Field(
        default_factory=_identity, description="Name of this process in the Lease."
    )
    leader_election: bool = Field(
        True, description="False only where one process is all there can be, such as a test."
    )
    lease_name: str = Field("kubedistill-operator", description="Name of the Lease.")
    lease_seconds: int = Field(
        15, ge=3, description="A standby takes over after the leader was silent this long."
    )
    lease_renew_seconds: float = Field(
        10.0, ge=2, description="A leader that could not renew for this long stops working."
    )
    lease_retry_seconds: float = Field(2.0, ge=1, description="Time between tries to renew.")
    workers: int = Field(8, ge=1, description="Objects that are reconciled at the same time.")
    resync_seconds: float = Field(
        300.0, gt=0, description="Everything is listed and looked at again this often."
    )
    api_timeout_seconds: float = Field(30.0, gt=0, description="Limit of one call to the API.")
    api_connections: int = Field(32, ge=1, description="Connections to the API server.")
    watch_server_seconds: int = Field(
        240, ge=5, description="The API server ends a watch after this long; it is opened again."
    )
    watch_inactivity_seconds: float = Field(
        90.0, ge=5, description="A watch without even a bookmark for this long is opened again."
    )
    progress_poll_seconds: float = Field(
        5.0, gt=0, description="Time between questions to rank 0 of a running gang."
    )
    progress_timeout_seconds: float = Field(
        2.0, gt=0, description="Limit of one question to rank 0."
    )
    backoff_base_seconds: float = Field(
        10.0, ge=0, description="Wait after the first charged failure; doubles with each."
    )
    backoff_cap_seconds: float = Field(300.0, ge=0, description="Longest wait between attempts.")
    termination_grace_seconds: int = Field(
        60, ge=1, description="Least terminationGracePeriodSeconds of the gang's pods."
    )
    termination_margin_seconds: int = Field(
        30,
        ge=0,
        description="Beyond their grace, pods are waited for this long; then fencing holds.",
    )
    elastic_wait_seconds: float = Field(
        120.0,
        gt=0,
        description="A gang with workers.minNodes waits this long for room before it goes on with "
        "fewer nodes.",
    )
    bind_address: str = Field("0.0.0.0", description="Address of the probes and metrics.")  # noqa: S104
    health_port: int = Field(
        8080, ge=0, le=65535, description="Port of /healthz, /readyz and /metrics."
    )
    log_level: str = Field("INFO", description="Least severe level that is logged.")

    @field_validator("watch_namespaces", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [name.strip() for name in value.split(",") if name.strip()]
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = os.environ.get("KUBEDISTILL_SETTINGS_FILE")
        file = (YamlConfigSettingsSource(settings_cls, yaml_file=path),) if path else ()
        return init_settings, env_settings, *file
