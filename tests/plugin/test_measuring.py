"""Measurements on first use, and how many tokens they take."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.build_profiles import (
    a_profile,
    profile_of,
    save_run,
    similarities_of,
    write_profile,
)
from support.plugin_project import (
    BASELINE,
    SATURATION,
    broken,
    failure,
    marked_test,
    properties,
    ran,
)
from support.tiny_models import tiny_bos_tokenizer, tiny_model

from cascade.corpora.blocks import load_blocks
from cascade.gate.accepting import store_profile
from cascade.gate.baselines import read_profile
from cascade.models.loading import load
from cascade.saturation.profile import analyze


def test_the_profile_covers_the_quick_gate_or_the_whole_corpus(
    guarded: pytest.Pytester, models: Path
) -> None:
    guarded.makepyfile(
        test_my_saturation="""
        import numpy as np

        from cascade import analyze, load_blocks

        def test_profile(cascade_model, cascade_profile, pytestconfig):
            blocks = load_blocks("texts.jsonl", cascade_model.tokenizer, seq_len=16)
            full = pytestconfig.getoption("cascade_full")
            record, arrays = cascade_profile.record(), cascade_profile.arrays()
            assert record.kind == "saturation"
            assert cascade_profile.statistics.layers == ("1", "2", "3", "4", "4+norm")
            count = len(blocks.ids) if full else 32
            assert record.layers[0].count == 16 * count
            assert len(cascade_profile.rows) == len(cascade_profile.sequence_fingerprints) == count
            assert cascade_profile.provenance.model.name == "tiny"
            assert cascade_profile.noise is None
            if full:
                whole = analyze(cascade_model, blocks).statistics.mean()
                assert np.array_equal(cascade_profile.statistics.mean(), whole)

        def test_check(saturation_baseline, cascade_profile, cascade_model):
            saturation_baseline.check(cascade_profile)
            cascade_model.layers[0] = None  # a second measurement would fail
            saturation_baseline.check(cascade_profile)
            cascade_profile.record()
        """
    )
    for options in ((), ("--cascade-full",)):
        ran(guarded, *options, "test_my_saturation.py").assert_outcomes(passed=2)
    # Also if the gate stopped early or was not comparable.
    guarded.makepyfile(
        test_my_saturation=f"""
        import numpy as np
        from pathlib import Path
        from cascade import read_profile

        def test_profile(cascade_profile):
            assert cascade_profile.record().layers[0].count == 512
            stored = read_profile(Path("{BASELINE}")).arrays()
            assert np.array_equal(cascade_profile.arrays()["edges"], stored["edges"])
            assert set(cascade_profile.sequence_fingerprints) < set(stored["sequence_fingerprint"])
        """
    )
    broken(guarded)
    ran(guarded, "test_my_saturation.py").assert_outcomes(passed=1)
    shutil.copytree(models / "other", guarded.path / "tiny")
    ran(guarded, "test_my_saturation.py", "--cascade-model=tiny").assert_outcomes(passed=1)


def test_the_gate_stops_as_soon_as_it_can_decide(guarded: pytest.Pytester) -> None:
    guarded.makepyfile(
        test_my_saturation=f"import pytest\n{SATURATION}"
        + marked_test(SATURATION, "saturation(tokens=40)", "few")
        + marked_test(SATURATION, "saturation(full=True)", "all")
    )

    def tokens(*options: object) -> list[str]:
        ran(guarded, "test_my_saturation.py", "--junitxml", "junit.xml", *options)
        return [values["cascade_tokens"] for values in properties("junit.xml")]

    whole = str(16 * len(read_profile(guarded.path / BASELINE).rows))
    assert tokens() == ["512", "32", whole]
    assert tokens("--cascade-tokens", 100) == ["96", "32", whole]
    assert tokens("--cascade-full") == [whole, whole, whole]
    broken(guarded)
    assert tokens() == ["16", "16", whole]  # the first sequence decides


def test_a_given_profile_is_compared_with_its_baseline(project: pytest.Pytester) -> None:
    # Read from files, as from another test or another machine.
    for name, seed in (("tiny", 0), ("moved", 0)):
        run = save_run(project.path / name, a_profile(12, seed=seed))
        for end in ("json", "npz", "parquet"):
            shutil.copy(run / f"profile.{end}", project.path / f"{name}.{end}")
    write_profile(Path("moved.json"), profile_of(similarities_of(12, shift=0.01)))
    stored = Path("baselines/tiny/words.saturation.json")
    stored.parent.mkdir(parents=True)
    for end in ("json", "npz", "parquet"):
        shutil.copy(f"tiny.{end}", stored.with_suffix(f".{end}"))
    project.makepyfile(
        test_my_saturation="""
        from pathlib import Path
        import pytest
        from cascade import read_profile

        @pytest.mark.parametrize("name", ["tiny", "moved"])
        def test_it(saturation_baseline, name):
            saturation_baseline.check(read_profile(Path(name + ".json")))
        """
    )
    done = ran(project, "test_my_saturation.py")
    done.assert_outcomes(passed=1, failed=1)
    assert failure(done).startswith("FAIL: drift")


def test_inconclusive_passes_unless_strict(project: pytest.Pytester) -> None:
    stored = Path("baselines/tiny/words.saturation.json")
    for path, seed, prints in ((stored, 0, 0), (Path("new.json"), 1, 100)):
        write_profile(path, a_profile(3, seed=seed, fingerprints=np.arange(3) + prints))
    test = """
    from pathlib import Path
    import pytest
    from cascade import read_profile

    def test_it(saturation_baseline):
        saturation_baseline.check(read_profile(Path("new.json")))

    @pytest.mark.saturation(strict={strict})
    def test_marked(saturation_baseline):
        saturation_baseline.check(read_profile(Path("new.json")))
    """
    project.makepyfile(test_my_saturation=test.format(strict=True))
    done = ran(project, "test_my_saturation.py")
    done.assert_outcomes(passed=1, failed=1)
    assert failure(done).startswith("INCONCLUSIVE: ")
    project.makepyfile(test_my_saturation=test.format(strict=False))
    done = ran(project, "test_my_saturation.py", "--cascade-strict")
    done.assert_outcomes(passed=1, failed=1)


def test_a_failure_reports_the_exit_layer_and_the_commands_to_run(
    guarded: pytest.Pytester, models: Path
) -> None:
    broken(guarded)
    only = ("-m", "saturation", "--cascade-exit-layer")
    said = failure(ran(guarded, *only, 3))
    assert "Exit layer 3 has moved; calibrate its threshold again (mean similarity exp" in said
    assert f"To inspect: cascade gate --model {models / 'tiny'} --corpus texts.jsonl" in said
    assert "To accept an intended change: cascade analyze" in said
    assert "&& cascade accept RUN --baselines baselines" in said
    assert "Exit layer 2 has not moved" in failure(ran(guarded, *only, 2))


def test_text_begins_with_bos_as_in_the_baseline_unless_the_session_says_otherwise(
    project: pytest.Pytester,
) -> None:
    tiny_model("llama", vocab_size=98).save_pretrained(project.path / "tiny")
    tiny_bos_tokenizer().save_pretrained(project.path / "tiny")
    stack = load(str(project.path / "tiny"))
    blocks = load_blocks(project.path / "texts.jsonl", stack.tokenizer, seq_len=16, bos="no")
    store_profile(project.path / "baselines", analyze(stack, blocks))
    given = ("-m", "saturation", "--cascade-model=tiny")
    ran(project, *given).assert_outcomes(passed=1, deselected=1)
    done = ran(project, *given, "--cascade-bos=yes")
    assert "expected corpus.bos without BOS, got with BOS" in failure(done)
