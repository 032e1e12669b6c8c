"""Hugging Face model folders, read by transformers; code that a folder brings does not run."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.errors import CheckpointError, UnavailableError
from optkit.failures import few, reason
from optkit.models import DimRange, Signature, TensorSpec
from optkit.source.reading import Read

if TYPE_CHECKING:
    from optkit.recipe import ModelSource

log = logging.getLogger(__name__)


def read_huggingface(path: Path, source: ModelSource) -> Read:
    """Read a folder of ``save_pretrained``; text models get their usual inputs."""
    try:
        import transformers
    except ImportError as error:
        raise UnavailableError(f"{path}: a Hugging Face model needs transformers: pip install transformers") from error
    try:
        with _quiet_transformers(transformers):
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            module, notes = _auto_class(transformers, config, path).from_pretrained(
                path, config=config, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:
        raise CheckpointError(f"{path}: transformers cannot load this folder: {reason(error)}") from error
    if missing := sorted(map(str, [*notes["missing_keys"], *notes["mismatched_keys"]])):
        # transformers would go on with random numbers
        raise CheckpointError(
            f"{path}: the weights lack {few(missing)} of {type(module).__name__}; correct config.json"
        )
    if unexpected := sorted(notes["unexpected_keys"]):
        log.warning("%s: weights that %s does not use: %s", path, type(module).__name__, few(unexpected))
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    return Read(module, "huggingface", guessed=_text_inputs(module))


def _auto_class(transformers: Any, config: Any, path: Path) -> Any:
    """``BertForMaskedLM`` wants ``AutoModelForMaskedLM``, and ``BertModel`` wants ``AutoModel``."""
    architecture = (config.architectures or ["Model"])[0]
    head = re.search(r"For[A-Z]\w*$", architecture)
    if head is not None and not hasattr(transformers, f"AutoModel{head[0]}"):
        log.warning("%s: transformers has no AutoModel%s; loaded without its head", path, head[0])
    return getattr(transformers, f"AutoModel{head[0]}" if head else "AutoModel", transformers.AutoModel)


@contextlib.contextmanager
def _quiet_transformers(transformers: Any) -> Iterator[None]:
    """No progress bars and no reports of its own: what matters in them is raised or logged here."""
    settings = transformers.utils.logging
    bars, verbosity = settings.is_progress_bar_enabled(), settings.get_verbosity()
    settings.disable_progress_bar()
    settings.set_verbosity_error()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()


def _text_inputs(module: Any) -> Signature | None:
    """Token ids and their mask, for a model that takes them."""
    taken = inspect.signature(module.forward).parameters
    names = [name for name in ("input_ids", "attention_mask") if name in taken]
    if module.main_input_name != "input_ids" or not names:
        return None
    # 514 positions mean 512 tokens in the RoBERTa family
    longest = min(1 << (getattr(module.config, "max_position_embeddings", 512).bit_length() - 1), 512)
    specs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in names)
    return Signature(specs, (), {"sequence": DimRange(1, min(128, longest), longest)})
