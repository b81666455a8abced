"""From a container's spec and its image to all that its process is made from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devcluster.node.container import Recipe
from devcluster.node.environment import ConfigError, Read, arguments, environment, quantity
from devcluster.node.image import Image
from devcluster.node.volumes import Volumes

_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def recipe(
    pod: dict[str, Any],
    container: dict[str, Any],
    image: Image,
    *,
    volumes: Volumes,
    read: Read,
    service: Mapping[str, str],
    allocatable: Mapping[str, str],
) -> Recipe:
    """Raises ConfigError in a kubelet's words when the container cannot be made yet."""
    of_pod = pod["spec"].get("securityContext") or {}
    security = {**of_pod, **(container.get("securityContext") or {})}
    user = int(security.get("runAsUser", image.user))
    if security.get("runAsNonRoot") and user == 0:
        raise ConfigError(_runs_as_root(pod, container))
    hostname = pod["spec"].get("hostname") or pod["metadata"]["name"]
    own = environment(container, pod, service, read, allocatable)
    limit = ((container.get("resources") or {}).get("limits") or {}).get("memory")
    groups = [int(group) for group in of_pod.get("supplementalGroups") or []]
    if "fsGroup" in of_pod:
        groups.append(int(of_pod["fsGroup"]))
    return Recipe(
        name=container["name"],
        command=arguments(container, image.entrypoint, image.command, own),
        env={**_base(image, hostname), **own},
        mounts=volumes.mounts(container, own),
        workdir=container.get("workingDir") or image.workdir,
        user=user,
        group=int(security.get("runAsGroup", image.group if user == image.user else 0)),
        groups=groups,
        read_only_root=bool(security.get("readOnlyRootFilesystem")),
        termination_path=container.get("terminationMessagePath") or "/dev/termination-log",
        log_as_message=container.get("terminationMessagePolicy") == "FallbackToLogsOnError",
        hostname=hostname[:63].rstrip("-."),
        passwd=image.passwd,
        memory_limit_bytes=quantity(limit) if limit else None,
    )


def _runs_as_root(pod: dict[str, Any], container: dict[str, Any]) -> str:
    name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
    where = f'(pod: "{name}({uid})", container: {container["name"]})'
    return f"container has runAsNonRoot and image will run as root {where}"


def _base(image: Image, hostname: str) -> dict[str, str]:
    """What every container of the image sees. Its own PATH names places of the image only."""
    of_image = {key: value for key, value in image.env.items() if key != "PATH"}
    path = f"{Path(sys.executable).parent}:{_SYSTEM_PATH}"
    return {"PATH": path, "HOSTNAME": hostname, "HOME": image.home, **of_image}
