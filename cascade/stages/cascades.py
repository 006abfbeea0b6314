"""Cascades: a base model and the stages that its hard tokens go on to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cascade.core.arguments import read_threshold
from cascade.core.errors import ModelError, RecordError, UsageError, first_line
from cascade.core.files import RunFolder
from cascade.core.records import read_record, to_json
from cascade.core.schema import known
from cascade.core.shapes import COUNT, FLAG, NUMBER, TEXT, Kind, Maybe, Shape, flaw, one_of
from cascade.decoding.early_exit import EarlyExit, Propagation, Score
from cascade.decoding.forward import Exit, ForwardPass
from cascade.decoding.generation import Generation
from cascade.decoding.inputs import make_chunk
from cascade.exits.fitted_heads import FittedHeads, load_heads
from cascade.exits.heads import LogitLens
from cascade.exits.history import exit_entries
from cascade.exits.rules import find_rule, looking_at
from cascade.models.flops import Counts
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.models.weights import file_hash
from cascade.stages.stage import STARTS, Stage, check_fits, extended, new_stage

#: The record of a saved cascade, and of a stage.
CONFIG = "cascade_config.json"
_KIND = "cascade"
_SCHEMA = 1

_THRESHOLD = Kind(
    "a number, or inf or -inf as text",
    lambda value: value in ("inf", "-inf") or NUMBER.holds(value),
)
_CONFIG: Shape = {
    "base": {
        "source": Maybe(TEXT),
        "weights_hash": TEXT,
        "tokenizer_hash": Maybe(TEXT),
        "num_layers": COUNT,
        "hidden_size": COUNT,
        "vocab_size": COUNT,
    },
    "propagation": one_of("frozen", "exact"),
    "stages": [
        {
            "file": TEXT,
            "sha256": TEXT,
            "num_layers": COUNT,
            "start": one_of(*STARTS),
            "own_head": FLAG,
            "entry": {
                "layer": COUNT,
                "rule": TEXT,
                "threshold": _THRESHOLD,
                "heads": Maybe(TEXT),
            },
        }
    ],
}


@dataclass(frozen=True)
class Entry:
    """Who enters a stage: tokens that its rule finds hard. The others leave below it.

    Attributes:
        layer: Decides, 1..N of the model below the stage.
        threshold: Tokens with a confidence at or above it leave.
        rule: The rule's name.
        heads: Fitted heads: easy tokens leave at `layer` itself, through its ridge head. Without,
            they leave behind the last layer below the stage, through the LM head there.
    """

    layer: int
    threshold: float
    rule: str = "cosine"
    heads: FittedHeads | None = None

    def exit_of(self, stack: DecoderStack) -> Exit:
        """Return where easy tokens leave a model, and how.

        Args:
            stack: The model below the stage.

        Raises:
            UsageError: No such layer or rule, or a threshold that the rule cannot give.
            ModelError: The heads belong to another model.
        """
        rule = find_rule(self.rule)
        exit_entries(self.layer, stack.num_layers)
        rule.check(self.threshold)
        threshold = read_threshold(self.threshold)
        if self.heads is not None:
            return Exit(self.layer, rule, threshold, self.heads.head(stack, self.layer))
        last = stack.num_layers
        rule = looking_at(rule, self.layer, leaving=last)
        return Exit(last, rule, threshold, LogitLens(stack))


class Cascade:
    """A base model and stages; each stage computes only the tokens that are hard below it.

    A stage's tokens attend to the hard tokens before them and to the exit states of the easy ones,
    at their own positions. The whole is an `EarlyExit` of the base with the stages' layers
    appended, so its laws hold: with all thresholds at -inf the cascade is the base, exactly; with
    +inf it is the base with all layers appended; generating equals scoring.

    Args:
        base: The base model; its weights are not touched.
        propagation: What a stage sees of easy tokens: "frozen" (keys and values from their exit
            states) or "exact" (they are computed once a hard one needs them).
        provenance: What is known of its origin.

    Raises:
        UsageError: Another propagation.
    """

    def __init__(
        self,
        base: DecoderStack,
        *,
        propagation: Propagation = "frozen",
        provenance: dict[str, Any] | None = None,
    ) -> None:
        if propagation not in ("frozen", "exact"):
            raise UsageError(
                f'expected a propagation of a cascade among frozen, exact, got "{propagation}"; '
                "ridge maps predict a model's own layers, not those of a stage"
            )
        self.base = base
        self.propagation: Propagation = propagation
        self.provenance = dict(provenance or {})
        self.stages: list[Stage] = []
        self.entrances: list[Entry] = []
        self._stacks = [base]
        self._exits: list[Exit] = []
        self._ways: dict[int, EarlyExit] = {}

    def add_stage(self, stage: Stage, entry: Entry) -> None:
        """Let the tokens that are hard so far go on to a stage.

        Args:
            stage: The stage; its weights take the base's dtype and device.
            entry: Who enters it.

        Raises:
            ModelError: The stage is of another width, vocabulary, tokenizer or base.
            UsageError: An entry that cannot be; or one at or below the one before it.
        """
        top = self.stack
        check_fits(top, stage)
        self._check_origin(stage)
        leaving = entry.exit_of(top)
        if self._exits and leaving.layer <= self._exits[-1].layer:
            raise UsageError(
                f"tokens enter this stage at layer {leaving.layer}, expected one above the entry "
                f"before it, layer {self._exits[-1].layer}"
            )
        for module in (stage.layers, *([] if stage.head is None else [stage.head])):
            module.to(device=top.device, dtype=top.dtype)
        self._stacks.append(extended(top, stage))
        self._exits.append(leaving)
        self.stages.append(stage)
        self.entrances.append(entry)

    def entered_like(self, other: Cascade) -> Cascade:
        """Return a cascade of these stages that tokens enter as they do another one's.

        Args:
            other: Of the same base, with as many stages.

        Raises:
            UsageError: With more stages, or fewer.
        """
        if len(other.entrances) != len(self.stages):
            raise UsageError(
                f"expected a cascade of {len(self.stages)} stages, got {len(other.entrances)}"
            )
        same = Cascade(self.base, propagation=self.propagation)
        for stage, entry in zip(self.stages, other.entrances, strict=True):
            same.add_stage(stage, entry)
        return same

    def _check_origin(self, stage: Stage) -> None:
        names = {
            "tokenizer_hash": "tokenizer",
            "vocab_size": "vocabulary",
            "weights_hash": "base model",
        }
        for name, expected, got in self._differences(stage.provenance.get("base") or {}, names):
            raise ModelError(
                f"the stage was trained for another {names[name]} ({expected}, here {got}); "
                "train one for this model"
            )

    def _differences(
        self, made_for: dict[str, Any], names: Iterable[str]
    ) -> Iterator[tuple[str, Any, Any]]:
        """Yield what of the base is known to be another: its name, what it was made for, ours."""
        own = self._base_record()
        for name in names:
            expected = made_for.get(name)
            if expected is not None and own[name] is not None and expected != own[name]:
                yield name, expected, own[name]

    def _base_record(self) -> dict[str, Any]:
        model = self.base.provenance
        return {
            "source": known(model.source),
            "name": known(model.name),
            "revision": known(model.revision),
            "family": known(model.family),
            "weights_hash": self.base.weights_hash(),
            "tokenizer_hash": known(model.tokenizer_hash),
            "num_layers": self.base.num_layers,
            "hidden_size": self.base.hidden_size,
            "vocab_size": self.base.vocab_size,
        }

    @property
    def stack(self) -> DecoderStack:
        """The base with the layers of all stages appended, itself a decoder stack."""
        return self._stacks[-1]

    def stack_below(self, stages: int) -> DecoderStack:
        """Return the base with the layers of its first stages, 0 for the base alone."""
        return self._stacks[stages]

    def routed(self) -> DecoderStack:
        """Return the stack whose `visit` lets tokens leave as they do in the cascade.

        Of tokens that left, every later entry of the history is their exit state. What a next
        stage is trained on is collected from it.
        """
        return _Routed(self)

    def early_exit(self, stages: int | None = None) -> EarlyExit:
        """Return the cascade, or the part of it up to a stage, as what runs it.

        Args:
            stages: How many stages; all where not given, 0 for the base alone.

        Raises:
            UsageError: More than there are.
        """
        count = len(self.stages) if stages is None else stages
        if not 0 <= count <= len(self.stages):
            raise UsageError(f"expected 0 to {len(self.stages)} stages, got {count}")
        if count not in self._ways:
            self._ways[count] = EarlyExit(
                self._stacks[count], exits=self._exits[:count], propagation=self.propagation
            )
        return self._ways[count]

    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        stages: int | None = None,
        keep_logits: bool = False,
    ) -> Score:
        """Run over given tokens; see `EarlyExit.score`.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`.
            stages: How many stages take part; all where not given.
            keep_logits: Whether to return all logits.
        """
        return self.early_exit(stages).score(input_ids, attention_mask, keep_logits=keep_logits)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        stages: int | None = None,
        **kwargs: Any,
    ) -> Tensor | Generation:
        """Generate; see `EarlyExit.generate`, whose settings these are.

        Args:
            input_ids: `[B, T]`, padded on the left.
            attention_mask: `[B, T]`.
            stages: How many stages take part; all where not given.
            kwargs: The settings.
        """
        return self.early_exit(stages).generate(input_ids, attention_mask, **kwargs)

    def exit_shares(self, score: Score) -> list[float]:
        """Return which share of the tokens left below each stage, and behind the last one.

        Args:
            score: Of the whole cascade.
        """
        places = [at.layer for at in self._exits] + [self.stack.num_layers]
        total = score.exit_layers.numel()
        return [float((score.exit_layers == place).sum()) / total for place in places]

    def stage_rows(self, counts: Counts) -> list[dict[str, int]]:
        """Return, per stage, what was really computed, summed over its layers.

        Args:
            counts: Of a score or a generation of the whole cascade.

        Returns:
            Token rows that went through its layers, and rows of which only keys and values were
            made.
        """
        rows = []
        for below, above in zip(self._stacks, self._stacks[1:], strict=False):
            part = slice(below.num_layers, above.num_layers)
            rows.append(
                {
                    "layer_rows": sum(counts.layer_rows[part]),
                    "key_value_rows": sum(counts.key_value_rows[part]),
                }
            )
        return rows

    # --- saved -------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Return the record that `save_pretrained` writes, without the stages' hashes."""
        return {
            "kind": _KIND,
            "schema": _SCHEMA,
            "base": self._base_record(),
            "propagation": self.propagation,
            "stages": [
                {
                    "file": f"stage-{number}.safetensors",
                    "num_layers": len(stage.layers),
                    "start": stage.start,
                    "own_head": stage.head is not None,
                    "entry": {
                        "layer": entry.layer,
                        "rule": entry.rule,
                        "threshold": entry.threshold
                        if math.isfinite(entry.threshold)
                        else str(entry.threshold),
                        "heads": None if entry.heads is None else f"heads-{number}.safetensors",
                    },
                    "provenance": stage.provenance,
                }
                for number, (stage, entry) in enumerate(
                    zip(self.stages, self.entrances, strict=True), start=1
                )
            ],
            "provenance": self.provenance,
        }

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write stages, entries and provenance to a folder; the base is named, not copied.

        All files appear together, or none.

        Args:
            folder: The folder, made where it is missing.
            overwrite: Replace a cascade that is there.

        Raises:
            OutputError: It holds a cascade already, or cannot be written.
        """
        record = self.config()
        files = [stage["file"] for stage in record["stages"]]
        files += [name for stage in record["stages"] if (name := stage["entry"]["heads"])]
        with RunFolder(Path(folder), [*files, CONFIG], overwrite=overwrite) as out:
            for about, stage, entry in zip(
                record["stages"], self.stages, self.entrances, strict=True
            ):
                weights = {name: value.contiguous() for name, value in stage.weights().items()}
                out.write(about["file"], save(weights, metadata={"format": "pt"}))
                about["sha256"] = file_hash(out.staging / about["file"])
                if entry.heads is not None:
                    entry.heads.save(out.staging / about["entry"]["heads"])
            out.write(CONFIG, to_json(record) + "\n")

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **kwargs: Any) -> Any:
        """Upload what `save_pretrained` writes to a model repository of the hub.

        Args:
            repo_id: "ORG/NAME"; made where it is missing.
            private: Whether a repository that is made is private.
            kwargs: For `huggingface_hub.HfApi.upload_folder`: revision, commit_message, ...
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(repo_id=repository, folder_path=folder, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        base: DecoderStack | None = None,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> Cascade:
        """Read a cascade that `save_pretrained` wrote.

        Args:
            source: The folder, or a hub id.
            base: Its base model, where it is loaded already.
            revision: Of the hub.
            dtype: To load the base in.
            device: To load the base on.

        Raises:
            RecordError: Nothing is there, or it is torn, edited or of a newer release.
            ModelError: The base is another model than the one it was made for.
        """
        folder = _folder_of(source, revision)
        record = read_record(folder / CONFIG, kind=_KIND)
        found = flaw(record, _CONFIG)
        if found is not None:
            raise RecordError(f"{folder / CONFIG} is torn or edited ({found}); restore it")
        made_for = record["base"]
        if base is None:
            if made_for["source"] is None:
                raise UsageError(
                    f"{source} was made for a model without a name; give it: "
                    "Cascade.from_pretrained(folder, base)"
                )
            base = load(
                made_for["source"], revision=made_for.get("revision"), dtype=dtype, device=device
            )
        cascade = cls(
            base, propagation=record["propagation"], provenance=record.get("provenance") or {}
        )
        cascade._check_base(made_for)
        for about in record["stages"]:
            stage = _read_stage(folder, about, cascade.stack)
            entry = about["entry"]
            heads = entry.get("heads")
            cascade.add_stage(
                stage,
                Entry(
                    entry["layer"],
                    float(entry["threshold"]),
                    entry["rule"],
                    None if heads is None else load_heads(folder / heads, cascade.stack),
                ),
            )
        return cascade

    def _check_base(self, made_for: dict[str, Any]) -> None:
        names = ("hidden_size", "vocab_size", "num_layers", "tokenizer_hash", "weights_hash")
        for name, expected, got in self._differences(made_for, names):
            raise ModelError(
                f"the cascade was made for the base {made_for.get('name') or '(unnamed)'} with "
                f"{name} {expected}, this model has {got}; load that base, or train "
                "stages for this one"
            )


class _Routed(DecoderStack):
    """A cascade's stack, shown as its tokens really go."""

    def __init__(self, cascade: Cascade) -> None:
        vars(self).update(vars(cascade.stack))
        self._early = cascade.early_exit()

    @torch.no_grad()
    def visit(self, input_ids: Tensor, visitor: Callable[[int, Tensor], None]) -> Tensor | None:
        """Show each entry of the hidden history; see `DecoderStack.visit`."""
        layers, (batch, length) = self._early.layers, input_ids.shape
        chunk = make_chunk(self, input_ids, torch.ones_like(input_ids))
        cache = layers.new_cache(batch, length, keep=False)
        cache.window(0, length)
        going = ForwardPass(layers, self._early.exits, chunk, cache, Counts.of(self.num_layers))
        exits = {at.layer: at for at in going.exits}
        visitor(0, going.hidden)
        nobody = torch.zeros_like(chunk.valid)
        for layer in range(1, self.num_layers + 1):
            going.run_layers_to(layer)
            visitor(layer, going.hidden)
            if layer in exits:
                going.decide(exits[layer], nobody, lambda *_: None)
        return None


def _folder_of(source: str | Path, revision: str | None) -> Path:
    """Return a local folder, or what the hub has under a name."""
    folder = Path(source).expanduser()
    if folder.is_dir() or isinstance(source, Path) or source.count("/") != 1:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=[CONFIG, "*.safetensors"])
        )
    except Exception as error:  # many unrelated types, one meaning for the user
        raise RecordError(
            f"no cascade {source}: {first_line(error)}; expected a folder of `cascade train`, or a "
            "hub id where the hub can be reached"
        ) from error


def _read_stage(folder: Path, about: dict[str, Any], below: DecoderStack) -> Stage:
    path = folder / Path(about["file"]).name
    if not path.is_file():
        raise RecordError(f"{path} is missing; restore it, or train the cascade anew")
    if file_hash(path) != about["sha256"]:
        raise RecordError(
            f"{path} is cut short or changed (its hash is not the one in {CONFIG}); restore it, or "
            "train the cascade anew"
        )
    stage = new_stage(below, about["num_layers"], start=about["start"], own_head=about["own_head"])
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RecordError(
            f"{path} is no readable safetensors file ({first_line(error)})"
        ) from error
    stage.load(weights)
    stage.provenance = dict(about.get("provenance") or {})
    return stage
