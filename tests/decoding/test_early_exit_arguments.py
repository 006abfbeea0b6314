"""Invalid exits, thresholds and heads give one-line errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.reference_early_exit import (
    LAYERS,
    PROPAGATIONS,
    a_stack,
    one_line,
    random_blocks,
    some_exits,
    some_heads,
)
from support.scoring import INF, logits_of
from support.tiny_models import VOCABULARY, random_ids, tiny_model
from torch import Tensor

from cascade.core.errors import ModelError, UsageError
from cascade.decoding.early_exit import EarlyExit, Propagation, make_exit
from cascade.decoding.forward import Exit
from cascade.exits.head_fitting import fit_heads
from cascade.exits.rules import RULES, find_rule
from cascade.models.stack import DecoderStack


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 0}, "expected an exit layer in 1..4, got 0"),
        ({"layer": LAYERS + 1}, "expected an exit layer in 1..4, got 5"),
        ({"layer": -1}, "expected an exit layer in 1..4, got -1"),
        ({"layer": True}, "expected an exit layer in 1..4, got True"),
        ({"layer": 2.0}, "expected an exit layer in 1..4, got 2.0"),
        (
            {"layer": 1, "rule": "mean_cosine"},
            "the rule mean_cosine compares 2 layers; expected an exit layer in 2..4, got 1",
        ),
        (
            {"layer": 2, "rule": "cosin"},
            f"expected a rule among {', '.join(RULES)}, got 'cosin'",
        ),
        (
            {"layer": 2, "propagation": "thawed"},
            "expected a propagation among frozen, ridge, exact, got 'thawed'",
        ),
        (
            {"layer": 2, "propagation": "ridge"},
            "ridge propagation needs fitted heads; create them with `cascade fit-heads`",
        ),
        (
            {"layer": 2, "threshold": 1.01},
            "the rule cosine gives confidences from -1 to 1; expected a threshold in this range "
            "(or inf, or -inf), got 1.01",
        ),
        (
            {"layer": 2, "rule": "top2_gap", "threshold": -0.1},
            "the rule top2_gap gives confidences from 0 to 1; expected a threshold in this range "
            "(or inf, or -inf), got -0.1",
        ),
        (
            {"layer": 2, "rule": "patience", "threshold": -1},
            "the rule patience gives confidences from 0; expected a threshold in this range (or "
            "inf, or -inf), got -1",
        ),
        (
            {"layer": 2, "threshold": math.nan},
            "the rule cosine gives confidences from -1 to 1; expected a threshold in this range "
            "(or inf, or -inf), got nan",
        ),
        ({"layer": [2, 3]}, "expected an exit layer in 1..4, got [2, 3]"),
        (
            {"layer": 2, "rule": ["cosine"]},
            f"expected a rule among {', '.join(RULES)}, got ['cosine']",
        ),
        *(
            (
                {"layer": 2, "threshold": value},
                f"expected a number as threshold (inf: no token exits), got {value!r}",
            )
            for value in (None, "x", "0.5", [0.5], 10**400)
        ),
        *(
            (
                layer | {"heads": "heads.safetensors"},
                "expected fitted heads, got str; read them with load_heads",
            )
            for layer in ({}, {"layer": 2})
        ),
    ],
)
def test_invalid_argument_gives_a_one_line_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        EarlyExit(a_stack("llama"), **settings)
    assert one_line(error) == message


@pytest.mark.parametrize("layers", [(2, 1), (2, 2), (1, 3, 2)])
def test_exits_out_of_order_are_rejected(layers: tuple[int, ...]) -> None:
    stack = a_stack("llama")
    exits = [make_exit(stack, layer, "cosine", 0.5) for layer in layers]
    with pytest.raises(UsageError) as error:
        EarlyExit(stack, exits=exits)
    assert one_line(error) == (
        f"expected exits in ascending order of layers, got layers {list(layers)}"
    )


@pytest.mark.parametrize(
    "others", [(), ((3, "cosine"),), ((3, "cosine"), (4, "top2_gap"))], ids=len
)
@pytest.mark.parametrize("threshold", [1.0, 0.0, INF])
def test_patience_without_earlier_exit_is_rejected(
    others: tuple[tuple[int, str], ...], threshold: float
) -> None:
    stack = a_stack("llama")
    exits = [make_exit(stack, 2, "patience", threshold)]
    exits += [make_exit(stack, layer, rule, 0.5) for layer, rule in others]
    with pytest.raises(UsageError) as error:
        EarlyExit(stack, exits=exits)
    assert one_line(error) == (
        "the rule patience needs an earlier exit, and there is none below layer 2; add exits below "
        "it, or use another rule"
    )
    # One exit below is enough, and its rule may be patience.
    for below in ("fixed", "patience"):
        EarlyExit(stack, exits=[make_exit(stack, 1, below, INF), *exits])


def test_thresholds_of_exits_are_checked() -> None:
    stack = a_stack("llama")
    at = Exit(2, find_rule("entropy"), 1.5, make_exit(stack, 2, "entropy", 0.5).head)
    with pytest.raises(UsageError, match=r"^the rule entropy gives confidences from 0 to 1; "):
        EarlyExit(stack, exits=[at])


@pytest.mark.parametrize("threshold", ["x", None])
def test_non_numeric_threshold_of_exit_is_rejected(threshold: Any) -> None:
    at = Exit(
        2, find_rule("entropy"), threshold, make_exit(a_stack("llama"), 2, "entropy", 0.5).head
    )
    with pytest.raises(UsageError) as error:
        EarlyExit(a_stack("llama"), exits=[at])
    assert one_line(error).startswith("expected a number as threshold")


def test_numpy_numbers_are_accepted() -> None:
    early = EarlyExit(
        a_stack("llama"), layer=np.int64(3), rule="top2_gap", threshold=np.float32(0.5)
    )
    (at,) = early.exits
    assert (type(at.layer), at.layer) == (int, 3)
    assert (type(at.threshold), at.threshold) == (float, 0.5)


def test_layer_and_exits_together_are_rejected() -> None:
    stack = a_stack("llama")
    with pytest.raises(UsageError) as error:
        EarlyExit(stack, layer=1, exits=some_exits(stack))
    assert one_line(error) == (
        "expected either layer or exits, got layer=1 and exits; give only one"
    )


def test_ridge_propagation_needs_map_of_every_exit_below_last_layer() -> None:
    stack, heads = a_stack("llama"), some_heads("llama")
    exits = [make_exit(stack, layer, "cosine", 0.5, heads=heads) for layer in (2, LAYERS)]
    with pytest.raises(UsageError) as error:
        EarlyExit(stack, exits=exits, propagation="ridge")
    assert one_line(error) == (
        "the exit at layer 2 has no propagation map; pass the map of its fitted heads, or use "
        "frozen propagation"
    )
    last = make_exit(stack, LAYERS, "cosine", 0.5, heads=heads, propagation="ridge")
    assert last.propagation is None
    EarlyExit(stack, exits=[last], propagation="ridge")


@pytest.mark.parametrize("propagation", ["frozen", "exact"])
def test_map_is_unused_without_ridge_propagation(propagation: Propagation) -> None:
    stack, heads, ids = a_stack("llama"), some_heads("llama"), random_ids(3, 20)
    with_map, without = (
        some_exits(stack, heads=heads, propagation=kind) for kind in ("ridge", "frozen")
    )
    assert with_map[0].propagation is not None
    one, other = (
        EarlyExit(stack, exits=exits, propagation=propagation).score(ids, keep_logits=True)
        for exits in (with_map, without)
    )
    assert torch.equal(logits_of(one), logits_of(other))
    assert not any(one.counts.predicted_rows)


def test_unfitted_layer_error_lists_fitted_layers() -> None:
    stack = a_stack("llama")
    heads = fit_heads(stack, random_blocks(), [1, 3])
    with pytest.raises(UsageError) as error:
        EarlyExit(stack, layer=2, heads=heads)
    assert one_line(error) == (
        "expected a layer that these heads were fitted for (1, 3), got 2; fit it with `cascade "
        "fit-heads --layers`"
    )


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_heads_of_another_model_error_names_both_models(propagation: Propagation) -> None:
    with pytest.raises(ModelError) as error:
        EarlyExit(a_stack("qwen2"), layer=2, heads=some_heads("llama"), propagation=propagation)
    text = one_line(error)
    assert text.startswith("these exit heads belong to ")
    assert "family llama" in text
    assert "family qwen2" in text
    assert text.endswith("; make them again for this model")


def test_exits_of_model_with_equal_weights_are_accepted() -> None:
    stack, same, other = (DecoderStack(tiny_model("llama", seed=seed)) for seed in (0, 0, 1))
    ids = random_ids()
    expected = EarlyExit(stack, layer=2, rule="top2_gap", threshold=0.1).score(ids)
    for heads in (None, fit_heads(other, random_blocks(), [2])):
        exits = [make_exit(other, 2, "top2_gap", 0.1, heads=heads)]
        with pytest.raises(ModelError) as error:
            EarlyExit(stack, exits=exits)
        assert one_line(error) == (
            "the heads of the exit at layer 2 belong to llama (weights_hash "
            f"{other.weights_hash()}), but the model is llama (weights_hash "
            f"{stack.weights_hash()}); make them again for this model"
        )
    score = EarlyExit(stack, exits=[make_exit(same, 2, "top2_gap", 0.1)]).score(ids)
    assert torch.equal(score.predictions, expected.predictions)


def test_custom_head_need_not_have_a_model() -> None:
    class Own:
        name, multiplications = "own", 0

        def logits(self, hidden: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(torch.full((len(hidden),), 5), VOCABULARY).float()

    early = EarlyExit(a_stack("llama"), exits=[Exit(2, find_rule("fixed"), 1.0, Own())])
    assert bool((early.score(random_ids()).predictions == 5).all())
