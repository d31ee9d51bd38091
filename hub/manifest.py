"""What an artifact says about itself: frozen, strict, with one canonical form and one digest.

The manifest digest, sha256 of the RFC 8785 JSON of the manifest, is the artifact's identity. Fields at their
defaults are left out of the canonical form, so a field added later changes no digest of what exists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from hub.errors import ManifestError, RefError, suggest
from hub.io import canonical_json as canonical
from hub.io.files import check_relative
from hub.ref import AdapterRef, check_digest, check_range, check_version

SCHEMA_VERSION = 1  # of `Manifest.schema_version`; raised only where an old reader would misread
MANIFEST_NAME = "module.json"
MAX_TENSORS = 100_000
MAX_FILE_BYTES = 2**40

ArtifactType = Literal["adapter", "composition", "router", "merge"]
Role = Literal["config", "weights", "extra", "card", "aux", "probes", "resume", "other"]


def _ref_rule(rule: Any) -> AfterValidator:
    """Turn a rule of hub.ref into a validator, so that pydantic reports the place of the bad value."""

    def check(text: str) -> str:
        try:
            return str(rule(text))
        except RefError as error:
            raise ValueError(error.message) from error

    return AfterValidator(check)


def _plain_id(text: str) -> str:
    ref = AdapterRef.parse(text)
    if ref.pin or ref.range:
        raise RefError(f"{text!r} must be a plain ns/name; version and range have fields of their own")
    return ref.id


Name = Annotated[str, _ref_rule(_plain_id)]
VersionText = Annotated[str, _ref_rule(check_version)]
RangeText = Annotated[str, _ref_rule(check_range)]
Digest = Annotated[str, _ref_rule(check_digest)]
RefText = Annotated[str, _ref_rule(AdapterRef.parse)]
Hex256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
RelativePath = Annotated[str, AfterValidator(check_relative)]
Word = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Text = Annotated[str, StringConstraints(max_length=8192)]
Words = Annotated[tuple[Word, ...], Field(max_length=10_000)]


class Record(BaseModel):
    """Base of every part of a manifest: frozen, no unknown fields, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields, those at their defaults left out."""
        return self.model_dump(mode="json", exclude_defaults=True)


RecordT = TypeVar("RecordT", bound=Record)


class FileEntry(Record):
    """One file of an artifact: POSIX path below its root, hex sha256 and size in bytes."""

    path: RelativePath
    sha256: Hex256
    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    role: Role = "other"

    @property
    def digest(self) -> str:
        """``sha256:`` and the hex digest."""
        return f"sha256:{self.sha256}"


class TensorEntry(Record):
    """One tensor: its name, safetensors dtype, shape and the hex sha256 of its raw little-endian bytes."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    dtype: Annotated[str, StringConstraints(pattern=r"^[A-Z0-9_]{1,16}$")]
    shape: tuple[NonNegativeInt, ...]
    sha256: Hex256


def weights_fingerprint(weights: Mapping[str, str]) -> str:
    """Digest of the canonical JSON of ``{tensor name: first 16 hex of its hash}``."""
    return canonical.digest(canonical.dumps(dict(weights)))


class BaseIdentity(Record):
    """Which frozen model an adapter was made for.

    Attributes
    ----------
    repo, revision
        Where the base comes from: ``builtin:tiny-lm``, ``org/name`` or a directory's name, and its commit.
    arch_digest
        Digest over the sorted (tensor name, shape) pairs and the architecture's class names.
    weights
        Tensor name -> first 16 hex of sha256(dtype|shape|raw bytes) of the unquantized file on disk.
    weights_fingerprint
        `weights_fingerprint` of `weights`; checked.
    """

    repo: Word
    revision: Word | None = None
    arch_digest: Digest
    weights_fingerprint: Digest
    weights: dict[str, Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]]
    config_digest: Digest
    tokenizer_digest: Digest | None = None
    chat_template_digest: Digest | None = None
    vocab_size: NonNegativeInt

    @model_validator(mode="after")
    def _fingerprint_agrees(self) -> BaseIdentity:
        if self.weights_fingerprint != weights_fingerprint(self.weights):
            raise ValueError("weights_fingerprint is not the digest of weights")
        return self


class TrainedOn(Record):
    """How the base was held while the adapter was trained."""

    quantization: Word = "none"
    block_size: int | None = None
    double_quant: bool | None = None
    compute_dtype: Word | None = None
    libraries: dict[str, str] = Field(default_factory=dict)


class Requirement(Record):
    """Another artifact that this one needs: its name, a version range, and the digest it was made with."""

    name: Name
    range: RangeText | None = None
    digest: Digest | None = None


class Metric(Record):
    """One measured figure: mean `value` with `sd` over `seeds`, on `n` examples of a dataset's split."""

    dataset: Word
    dataset_digest: Digest | None = None
    split: Word = "test"
    metric: Word
    value: float
    sd: float | None = None
    n: NonNegativeInt | None = None
    seeds: tuple[int, ...] = ()


class Lineage(Record):
    """Where an artifact comes from: parent refs, the run, digests of its data, the code's commit."""

    parents: tuple[RefText, ...] = ()
    run: Word | None = None
    data: dict[str, Digest] = Field(default_factory=dict)
    code_commit: Word | None = None


class Draft(Record):
    """What an author states about an artifact; `hub.pack.pack` adds what can be measured.

    `reader` names what turns the artifact's texts into labels (see `compose.reader`); None: a head of the base, if any.
    """

    name: Name
    version: VersionText
    type: ArtifactType = "adapter"
    kind: Annotated[str, StringConstraints(max_length=64)] = ""
    method: Annotated[str, StringConstraints(max_length=64)] = ""
    hyperparameters: dict[str, JsonValue] = Field(default_factory=dict)
    base: BaseIdentity | None = None
    trained_on: TrainedOn | None = None
    requires: tuple[Requirement, ...] = ()
    placement: Words = ()
    task: Word | None = None
    labels: Words = ()
    reader: Word | None = None
    languages: Words = ()
    domains: Words = ()
    metrics: tuple[Metric, ...] = ()
    lineage: Lineage | None = None
    license: Word | None = None
    expression: Text | None = None
    summary: Text = ""

    @property
    def ref(self) -> AdapterRef:
        """``ns/name@version``."""
        return AdapterRef.parse(self.name).at(version=self.version)

    @property
    def head_task(self) -> str | None:
        """The task that the base is loaded for; None where a reader answers, which reads the base as it was saved."""
        return None if self.reader else self.task

    @model_validator(mode="after")
    def _type_has_its_facts(self) -> Draft:
        if self.type == "adapter" and not self.kind:
            raise ValueError("an adapter needs a kind (lora, ia3, ...)")
        if self.type == "composition" and not self.expression:
            raise ValueError("a composition needs an expression")
        return self


class Manifest(Draft):
    """A draft plus what was measured when it was packed: files, tensors, digests, warnings of the gates.

    When it was published is no part of it: each store's log says that, and `created` is only read. So the same bytes
    are the same artifact whenever they are packed.
    """

    schema_version: Literal[1] = 1
    files: tuple[FileEntry, ...] = ()
    tensors: Annotated[tuple[TensorEntry, ...], Field(max_length=MAX_TENSORS)] = ()
    tensors_digest: Digest
    warnings: tuple[str, ...] = ()
    created: AwareDatetime | None = None

    @field_validator("created")
    @classmethod
    def _whole_utc_seconds(cls, value: datetime | None) -> datetime | None:
        return None if value is None else value.astimezone(timezone.utc).replace(microsecond=0)

    @model_validator(mode="after")
    def _entries_are_unique(self) -> Manifest:
        for what, names in (
            ("file", [entry.path for entry in self.files]),
            ("tensor", [entry.name for entry in self.tensors]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"a {what} is listed twice")
        paths = [entry.path for entry in self.files]
        folded = {path.casefold() for path in paths}
        if len(folded) != len(paths) or MANIFEST_NAME in folded:
            raise ValueError("two files differ only by case, or module.json lists itself")
        if sorted(paths) != paths:
            raise ValueError("files are not sorted by path")
        return self

    @cached_property
    def canonical(self) -> bytes:
        """RFC 8785 JSON: what the store keeps and what the digest is taken of."""
        return canonical.dumps({"schema_version": self.schema_version, "type": self.type, **self.as_dict()})

    @cached_property
    def digest(self) -> str:
        """Identity of the artifact: ``sha256:`` of `canonical`."""
        return canonical.digest(self.canonical)

    def replace(self, **changes: Any) -> Manifest:
        """Return a copy with other fields, validated; unlike ``model_copy`` it carries no cached digest over."""
        return Manifest.model_validate({**{name: getattr(self, name) for name in Manifest.model_fields}, **changes})

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)

    def file(self, path: str) -> FileEntry | None:
        """Return the entry of a path, or None."""
        return next((entry for entry in self.files if entry.path == path), None)

    def draft(self) -> Draft:
        """Return the author's part alone."""
        return Draft.model_validate({name: getattr(self, name) for name in Draft.model_fields})

    @classmethod
    def parse(cls, data: bytes, *, what: str = MANIFEST_NAME) -> Manifest:
        """Read a manifest from outside.

        Raises
        ------
        ManifestError
            Naming the place: line and column of broken JSON, or the path of the field (``files[3].sha256``).
        """
        value = canonical.loads(data, what=what)
        if not isinstance(value, dict):
            raise ManifestError(f"{what} is not a JSON object", path=what)
        version = value.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise ManifestError(
                f"{what} has schema_version {version}; this version reads up to {SCHEMA_VERSION}",
                hint="upgrade moduloom",
            )
        manifest = validate(cls, value, what=what)
        _ = manifest.digest  # what has no canonical form (a lone surrogate, a huge integer) is refused here
        return manifest


def validate(model: type[RecordT], value: object, *, what: str) -> RecordT:
    """Validate a record; ManifestError lists each bad field by its path, with did-you-mean for unknown ones."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        lines, hint = [], None
        for problem in problems[:8]:
            place = _place(problem["loc"])
            lines.append(f"{place or 'as a whole'}: {problem['msg'].removeprefix('Value error, ')}")
            if problem["type"] == "extra_forbidden":
                hint = hint or suggest(str(problem["loc"][-1]), model.model_fields)
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ManifestError(f"{what}: " + "; ".join(lines) + more, path=what, hint=hint) from error


def _place(location: tuple[int | str, ...]) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return re.sub(r"^\.", "", place)[:200]


def read_manifest(directory: Path) -> Manifest:
    """Read and validate ``module.json`` of an artifact directory."""
    from hub.io.files import read_capped

    path = directory / MANIFEST_NAME
    return Manifest.parse(read_capped(path, canonical.MAX_JSON), what=str(path))
