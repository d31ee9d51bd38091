"""vLLM's plugin: refs, ranges, aliases and expressions as names of models. Chosen with ``VLLM_PLUGINS=moduloom``.

Two of vLLM's own doors are used, and nothing of it is replaced by patches. ``vllm.general_plugins``: a `LoRAResolver`,
which is asked for a name that vLLM does not know. ``vllm.endpoint_plugins``: told of the server's state when it starts;
there the dictionary of loaded adapters, in which vLLM would keep a name for good, becomes a
:class:`router.upstream.served.Served`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMNotFoundError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from compose.errors import ExpressionError
from hub.errors import HubError, NotFound, RefError, RemoteError, StoreError, UsageError
from router.upstream.lowered import Lowering
from router.upstream.names import Names, is_word
from router.upstream.served import Served

NAME = "moduloom"
REMOTES, MAX_DISCARDED = "MODULOOM_VLLM_REMOTES", "MODULOOM_VLLM_MAX_DISCARDED"
_log = logging.getLogger("vllm.moduloom")  # below vLLM's own, so that it is printed like the rest


class Refused(VLLMClientError):  # type: ignore[misc]  # vLLM is no dependency of ours
    """A name that cannot be served: 400 in vLLM's own form."""


class AdapterResolver(LoRAResolver):  # type: ignore[misc]
    """Resolves names by the store, the remotes and the algebra."""

    def __init__(self) -> None:
        self.lowering: Lowering | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter that a name stands for now, or None for a name that is none of ours (404)."""
        if self.lowering is None:
            raise Refused(f"{lora_name} cannot be resolved: {_no_door()}")
        try:
            made = await asyncio.to_thread(self.lowering.get, lora_name)
        except (NotFound, RefError, ExpressionError) as error:
            if is_word(lora_name):
                return None
            raise (VLLMNotFoundError if isinstance(error, NotFound) else Refused)(_told(error)) from error
        except (RemoteError, StoreError) as error:
            raise GracefulHTTPError(_told(error), 503) from error
        except HubError as error:
            raise Refused(_told(error)) from error
        _log.info("%s is %s: rank %d, %s", lora_name, made.meaning.name, made.rank, made.certificate)
        return LoRARequest(made.meaning.name, made.meaning.number, str(made.directory))


RESOLVER = AdapterResolver()


def register() -> None:
    """Entry point of ``vllm.general_plugins``: does nothing unless ``VLLM_PLUGINS`` names it."""
    if NAME in (envs.VLLM_PLUGINS or ()):
        LoRAResolverRegistry.register_resolver(NAME, RESOLVER)


class Endpoint:
    """Entry point of ``vllm.endpoint_plugins``: opens the resolver for the base that is served; adds no route."""

    name = NAME
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Nothing: vLLM's own routes serve our names."""

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Make the names of this server's base known to vLLM.

        Raises
        ------
        UsageError
            The server was not started for adapters that come while it runs, or a number is none.
        """
        if engine_client is None:  # a server that only renders prompts
            return
        models: Any = getattr(state, "openai_serving_models", None)
        if not isinstance(getattr(models, "lora_requests", None), dict):
            raise UsageError(f"the plugin {NAME} does not know this server: {_no_door()}")
        config = state.vllm_config.lora_config
        if config is None:
            raise UsageError(f"the plugin {NAME} has no use without adapters", hint="start vLLM with --enable-lora")
        if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            raise UsageError(
                f"the plugin {NAME} resolves names while the server runs, which vLLM was not allowed",
                hint="set VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
            )
        names = Names(
            _base(state.vllm_config.model_config),
            rank=int(config.max_lora_rank),
            max_discarded=_share(os.environ.get(MAX_DISCARDED, "0")),
            remotes=[place.strip() for place in os.environ.get(REMOTES, "").split(",") if place.strip()],
        )
        await asyncio.to_thread(names.identity)
        RESOLVER.lowering = Lowering(names)
        models.lora_requests = Served(models.lora_requests, lambda text: _own_name(names, text))
        _log.info("adapters of %s are served by their names in %s", names.base, names.home)


def _own_name(names: Names, text: str) -> str | None:
    meaning = names.now(text)
    return None if meaning is None else meaning.name


def _base(config: Any) -> str:
    """The base that vLLM serves, as we name it."""
    at = config.revision
    return str(config.model) if at is None or Path(config.model).is_dir() else f"{config.model}@{at}"


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UsageError(f"{MAX_DISCARDED}={text} is no share of a change", hint=f"{MAX_DISCARDED}=0.01 allows 1%")
    return share


def _told(error: HubError) -> str:
    return error.message if error.hint is None else f"{error.message} ({error.hint})"


def _no_door() -> str:
    return (
        f"vLLM {version_of_vllm()} did not call its vllm.endpoint_plugins as 0.32 does, so a name that moves would be "
        "served as it was first"
    )


def version_of_vllm() -> str:
    """Version of the vLLM that runs, whatever its distribution is called."""
    import vllm

    return str(getattr(vllm, "__version__", "")) or version("vllm")
