"""The faults that the gate is tested with, and what it is to make of each."""

from __future__ import annotations

import torch

from support import faults as plants
from support.faults import Fault, wrong_pairs

#: Faults of a Llama-shaped model of 30 layers.
FAULTS = {
    "index above": Fault(
        "exit index off by one: the pair above",
        wrong_pairs(plants.pair_above),
        "capture",
        named="rows of the pair above",
    ),
    "index below": Fault(
        "exit index off by one: the pair below",
        wrong_pairs(plants.pair_below),
        "capture",
        named="rows of the pair below",
    ),
    "norm": Fault(
        "last layer read after the final norm",
        wrong_pairs(plants.norm_mixed_up),
        "capture",
        "30",
        named="last layer read after the final norm",
    ),
    "before norm": Fault(
        "last state read before the final norm",
        wrong_pairs(plants.never_normed),
        "capture",
        "30+norm",
        named="last state read before the final norm",
    ),
    "norm of ones": Fault(
        "final norm's weights replaced by ones",
        plants.final_norm_of_ones,
        "layer",
        "30+norm",
        named="final norm of equal weights",
    ),
    "norm skipped": Fault(
        "final norm skipped",
        plants.final_norm_skipped,
        "layer",
        "30+norm",
        named="final norm skipped",
    ),
    "shuffled": Fault(
        "sequences shuffled between rows",
        plants.changed(lambda v: v.flip(dims=(1,))),
        "capture",
        named="sequences in another order",
    ),
    "mlp": Fault(
        "layer 13's MLP output x 1.01",
        plants.scaled_mlp(13),
        "layer",
        "13",
        named="scaled mlp.down_proj",
    ),
    "mlp 30": Fault(
        "layer 30's MLP output x 1.01",
        plants.scaled_mlp(30),
        "layer",
        "30",
        named="scaled mlp.down_proj",
    ),
    "attention in code": Fault(
        "layer 13's attention output x 1.01, in code",
        plants.scaled_in_code(13),
        "layer",
        "13",
        named="scaled self_attn.o_proj",
    ),
    "head": Fault(
        "one attention head of layer 13 zeroed",
        plants.dead_head(13),
        "layer",
        "13",
        named="weights changed",
    ),
    "swap": Fault(
        "layers 13 and 14 swapped", plants.swapped(13), "layer", "13", named="layers swapped"
    ),
    "skip": Fault("layer 13 skipped", plants.skipped(13), "layer", "13", named="layer skipped"),
    "int8 one": Fault(
        "layer 13's weights in int8, round to nearest",
        plants.int8(13),
        "layer",
        "13",
        named="weights in int8",
    ),
    "int8 all": Fault(
        "all layers' weights in int8, round to nearest",
        plants.int8(),
        "numerics",
        named="weights in int8",
    ),
    "bf16": Fault(
        "all weights through bf16 and back",
        plants.through(torch.bfloat16),
        "numerics",
        named="weights in bfloat16",
    ),
    "fp16": Fault(
        "all weights through fp16 and back",
        plants.through(torch.float16),
        "numerics",
        named="weights in float16",
    ),
    "autocast": Fault(
        "products rounded to bf16 by autocast",
        plants.autocast,
        "numerics",
        named="precision of products",
    ),
    "cosine bf16": Fault(
        "similarity computed in bf16",
        plants.in_bf16,
        "numerics",
        named="similarity in bfloat16",
    ),
    "rope": Fault(
        "RoPE base 10,000 instead of 100,000",
        plants.rope_base,
        "model",
        "1",
        named="rotary frequencies",
    ),
    "mask 1": Fault(
        "causal mask off by one: the next token is seen", plants.mask(1), "model", "1", named="mask"
    ),
    "mask all": Fault("bidirectional attention", plants.mask(None), "model", "1", named="mask"),
    "scale": Fault(
        "attention scale x 1.05", plants.attention_scale, "model", "1", named="setting scaling"
    ),
    "sdpa": Fault(
        "SDPA kernel with an attention scale x 1.02",
        plants.wrong_sdpa,
        "model",
        "1",
        named="attention kernel",
    ),
    "epsilon": Fault(
        "RMS-norm epsilon 1e-2 instead of 1e-5",
        plants.norm_epsilon(1e-2),
        "model",
        "1",
        named="setting variance_epsilon",
    ),
    "small epsilon": Fault(
        "RMS-norm epsilon 1e-6 instead of 1e-5",
        plants.norm_epsilon(1e-6),
        "model",
        "1",
        named="setting variance_epsilon",
    ),
    "axis": Fault(
        "mean over the wrong axis", plants.wrong_axis, "counting", named="mean over sequences"
    ),
    "bin": Fault("quantiles off by one bin", plants.next_bin, "counting"),
    "bos": Fault("a tokenizer that adds BOS", plants.begins_with_bos, "corpus.bos"),
    "pair": Fault(
        "pair swapped: output against input",
        wrong_pairs(plants.swapped_pair),
        None,
        unseen="the cosine is symmetric, so the numbers are right",
    ),
    "positions": Fault(
        "position ids shifted by one",
        plants.shifted_positions,
        None,
        unseen=(
            "rotary attention depends on distances only, so the numbers are right; with learned "
            "positions (GPT-2) it is seen"
        ),
    ),
    "tie": Fault(
        "threshold compared with > instead of >=",
        plants.above_only,
        None,
        unseen="the gate compares no similarity with a threshold; the tests of exit rules see it",
    ),
    "labels": Fault(
        "labels shifted by one",
        plants.shifted_labels,
        None,
        unseen="no label is read here; budgets of early exit see it in their agreement",
    ),
}
