"""Reports of drafters: what was trained, and what its drafts are worth on held-out text."""

from __future__ import annotations

from rich.console import Console

from cascade.core.schema import to_plain
from cascade.drafters.records import DrafterRecord, MethodFigures, PromptCorpus
from cascade.report.common.exit_wording import share
from cascade.report.common.sections import (
    Lead,
    Pairs,
    Report,
    Section,
    print_sections,
    table_of,
)
from cascade.report.common.words import counted, listed

#: What to do, by the fastest way to draft.
_ADVICE = {
    "none": "Draft nothing",
    "lookup": "Draft without this drafter",
    "table": "Draft with the table of this drafter, without its network",
    "table and network": "Draft with this drafter",
}


def print_drafter(record: DrafterRecord, console: Console) -> None:
    """Print the report of a drafter.

    Args:
        record: The drafter's record.
        console: Where to print; its width and encoding are respected.
    """
    print_sections(drafter_report(record), console)


def drafter_report(record: DrafterRecord) -> Report:
    """Return the report of a drafter.

    Args:
        record: The drafter's record.
    """
    model = record.provenance.model
    name = str(model.name or model.family)
    return Report(
        kicker="CASCADE drafter",
        title=f"Drafter of {name}: {record.vocabulary:,} tokens, a copy of layer "
        f"{record.feature_layers[-1]}",
        about=f"Model: {name}, {model.dtype} on {model.device}",
        sections=(
            Section("", (Pairs(_pairs(record)),)),
            Section(
                "Training",
                (
                    table_of(
                        "Shares of drafts that the model accepts, if it accepts all before them",
                        ("step", *_positions(record), "tokens/pass", "weights"),
                        [
                            [
                                f"{each.step:,}",
                                *(share(accepted) for accepted in each.accepted),
                                f"{each.tokens_per_pass:.2f}",
                                "kept" if each.step == record.chosen_step else "",
                            ]
                            for each in record.evaluations
                        ],
                        text_columns=1,
                    ),
                ),
            ),
            Section(
                "Worth",
                (
                    table_of(
                        "Ways to draft, decoded on this machine behind other held-out prompts",
                        ("draft", "tokens/pass", "ms/token", "speed"),
                        [_row(each) for each in record.methods],
                    ),
                    Lead(advice(record)),
                ),
            ),
        ),
        provenance=to_plain(record.provenance),
    )


def advice(record: DrafterRecord) -> str:
    """Return which way to draft is the fastest, and by how much, as a sentence.

    Args:
        record: The drafter's record.
    """
    rows = {each.method: each for each in record.methods}
    network, table, plain = (rows[name] for name in ("table and network", "table", "lookup"))
    return (
        f"{_ADVICE[record.use]}: decoding is {network.speed:.2f} times as fast with its table and "
        f"network as without drafts, {table.speed:.2f} times with its table alone, and "
        f"{plain.speed:.2f} times with lookup and runner-ups alone."
    )


def _pairs(record: DrafterRecord) -> tuple[tuple[str, str], ...]:
    texts, held_out, config = record.texts, record.held_out, record.config
    return (
        *(("Corpus", _corpus_words(corpus)) for corpus in record.provenance.corpora),
        (
            "Text",
            f"{counted(texts.tokens, 'token')} in {counted(texts.texts, 'text')}, "
            f"{share(texts.greedy)} of them greedy; held out "
            f"{counted(held_out.tokens, 'token')} in {counted(held_out.texts, 'text')}",
        ),
        (
            "Drafter",
            f"reads the inputs of layers {listed([str(each) for each in record.feature_layers])} "
            f"and the normed output; its tokens cover {share(record.coverage)} of held-out text",
        ),
        (
            "Table",
            f"{counted(record.contexts, 'n-gram')} of up to 3 tokens, and what followed them",
        ),
        (
            "Training",
            f"{counted(config.steps, 'step')} of {config.step_tokens:,} tokens in "
            f"{record.precision}, seed {config.seed}",
        ),
    )


def _corpus_words(corpus: PromptCorpus) -> str:
    left_out = f", {corpus.too_long:,} too long" if corpus.too_long else ""
    return (
        f"{corpus.source}: {counted(corpus.train, 'prompt')} to train, "
        f"{corpus.held_out:,} held out{left_out}"
    )


def _positions(record: DrafterRecord) -> list[str]:
    return [f"draft {number}" for number in range(1, len(record.accepted) + 1)]


def _row(figures: MethodFigures) -> list[str]:
    return [
        figures.method,
        f"{figures.tokens_per_pass:.2f}",
        f"{figures.milliseconds:.1f}",
        f"{figures.speed:.2f} x",
    ]
