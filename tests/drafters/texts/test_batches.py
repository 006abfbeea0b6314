"""Texts that are generated in batches are the model's own, with its states."""

from __future__ import annotations

import pytest
import torch
from support.tiny_drafters import DRAFTED, a_drafted_stack, generated, jobs, some_texts, states_of
from support.tiny_models import tiny_model

from cascade.core.errors import ModelError
from cascade.drafters.texts.batches import BatchedGenerator, Job
from cascade.models.stack import DecoderStack


@pytest.mark.parametrize("family", DRAFTED)
def test_greedy_texts_are_those_of_generate(family: str) -> None:
    stack = a_drafted_stack(family)
    for job, text in zip(jobs(6), some_texts(family), strict=True):
        prompt = torch.tensor([job.ids])
        own = stack.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=job.longest,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=1,
        )
        assert text.ids.tolist() == own[0].tolist()
        assert (text.prompt, text.greedy) == (len(job.ids), True)


@pytest.mark.parametrize("family", DRAFTED)
def test_features_are_the_states_of_the_model(family: str) -> None:
    stack = a_drafted_stack(family)
    for text in some_texts(family):
        own = states_of(stack, text.ids[:-1])
        assert text.features.shape == own.shape
        # Stored in bfloat16, which has 8 bits.
        torch.testing.assert_close(text.features.float(), own, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_texts_do_not_depend_on_the_rows_beside_them(temperature: float) -> None:
    stack, wanted = a_drafted_stack(), jobs(9, temperature=temperature)
    alone = [generated(stack, [job], batch_size=1)[0] for job in wanted]
    together = generated(stack, wanted, batch_size=4)
    assert [text.ids.tolist() for text in together] == [text.ids.tolist() for text in alone]
    assert all(text.greedy == (temperature == 0) for text in together)


def test_sampled_texts_depend_on_their_seed_alone() -> None:
    stack = a_drafted_stack()
    (ids,) = {job.ids for job in jobs(1)}
    wanted = [Job(ids, 1.5, f"{number}", 12) for number in range(6)]
    found = [text.ids.tolist() for text in generated(stack, wanted)]
    assert found == [text.ids.tolist() for text in generated(stack, wanted)]
    assert len({tuple(each) for each in found}) > 3


def test_sampling_follows_the_probabilities_of_the_model() -> None:
    stack = a_drafted_stack()
    ids = (5, 7, 9)
    logits = stack.model(torch.tensor([ids])).logits[0, -1].detach()
    shares = (logits / 2.0).softmax(dim=-1)
    wanted = [Job(ids, 2.0, f"{number}", 1) for number in range(1000)]
    texts = generated(stack, wanted, batch_size=1)
    counts = torch.bincount(torch.tensor([int(text.ids[3]) for text in texts]), minlength=97)
    # The standard error of a share of 1,000 draws is at most 0.016.
    assert float((counts / 1000 - shares).abs().max()) < 0.06


def test_a_long_run_moves_the_columns_of_the_cache() -> None:
    # 24 columns of a text and 12 more: forty texts in a row pass far beyond them.
    stack, wanted = a_drafted_stack(), jobs(40)
    texts = generated(stack, wanted, batch_size=3)
    assert [text.ids.tolist() for text in texts] == [
        generated(stack, [job], batch_size=1)[0].ids.tolist() for job in wanted
    ]


def test_a_job_that_a_finished_text_adds_is_done_as_well() -> None:
    stack, (first, second) = a_drafted_stack(), jobs(2)
    waiting, found = [first], list[str]()

    def done(job: Job, _: object) -> None:
        found.append(job.seed)
        if job is first:
            waiting.append(second)

    generator = BatchedGenerator(
        stack, (1,), batch_size=4, longest_prompt=10, longest=24, ends=(1,)
    )
    generator.run(lambda: waiting.pop(0) if waiting else None, done, lambda tokens: None)
    assert found == [first.seed, second.seed]


def test_logits_that_are_not_finite_are_refused() -> None:
    stack = DecoderStack(tiny_model("llama"))
    with torch.no_grad():
        stack.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="the logits of generated text are not finite"):
        generated(stack, jobs(1))
