"""The check of a profile against its baseline, and the base class of both checks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec.structs
import pytest

from cascade.core.errors import CascadeError, RecordError
from cascade.core.printable import printable
from cascade.core.schema import known
from cascade.gate.records import ComparisonRecord, MissingBaseline, NamedComparison, Verdict
from cascade.plugin.measuring import MeasuredProfile, create_command, missing_line, one_line
from cascade.plugin.results import Findings, drawn
from cascade.plugin.settings import Settings, saturation_options, shown

if TYPE_CHECKING:
    from cascade.gate.baselines import StoredProfile
    from cascade.saturation.profile import SaturationProfile


@dataclass
class Check:
    """The base class of both checks.

    Attributes:
        item: The test.
        settings: The settings of the session.
        findings: The findings of the session, to which the check adds.
    """

    item: pytest.Item
    settings: Settings
    findings: Findings

    #: The name of the marker.
    kind = ""

    @property
    def _regeneration(self) -> str | None:
        """The option of pytest-regressions that regenerates a baseline; None if not given."""
        for option in ("--regen-all", "--force-regen"):
            if self.item.config.getoption(option[2:].replace("-", "_"), default=False):
                return option
        return None

    @contextlib.contextmanager
    def _noted(self, path: Path) -> Iterator[str | None]:
        """Record that a baseline is used, and add any error to the findings.

        Yields the option that regenerates the baseline; None if not given.
        """
        self.findings.note_used(self.kind, self.settings.name_of(path))
        option = self._regeneration
        with one_line():
            try:
                if option is not None:
                    self._refuse_remote(option)
                    self._refuse_in_ci(path, option)
                yield option
            except CascadeError as error:
                self._add_nothing(path, " ".join(str(error).splitlines()))
                self._add_properties("NOT COMPARABLE", "none", 0)
                raise

    def _add_nothing(self, path: Path, reason: str) -> None:
        """Add a NOT COMPARABLE outcome with its reason to the findings."""
        raise NotImplementedError

    def _refuse_remote(self, option: str) -> None:
        remote = self.settings.remote
        if remote is not None:
            raise RecordError(
                f"{option} does not write to {remote.url}; run it with a local folder "
                f"(--cascade-baselines=baselines), review that, then {remote.push_words}"
            )

    def _refuse_in_ci(self, path: Path, option: str) -> None:
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            raise RecordError(
                f"{option} is not allowed when CI is set, because a person must review a baseline "
                f"before it is accepted; run it locally and commit {shown(path)}"
            )

    def _add_properties(self, verdict: Verdict, worst: str, tokens: int) -> None:
        values = {"verdict": verdict, "worst_cell": worst, "tokens": str(tokens)}
        self.item.user_properties += [(f"cascade_{name}", v) for name, v in values.items()]

    def _fail_missing(self, path: Path) -> NoReturn:
        line = missing_line(path, self.settings)
        is_local = self.settings.remote is None
        if is_local and self.item.config.getoption("force_regen", default=None) is not None:
            line += f", or with `pytest --force-regen -m {self.kind}`"
        command = create_command(path, self.settings).replace("`", "").replace(" and ", " && ")
        name = self.settings.name_of(path)
        self.findings.missing.append(MissingBaseline(path=name, command=command))
        self._add_properties("FAIL", "no baseline", 0)
        pytest.fail(printable(line, keep="\n"), pytrace=False)

    def _regenerated(self, path: Path, option: str, moved: str) -> None:
        self.findings.regenerated.append(shown(path))
        self._add_properties("INCONCLUSIVE", "regenerated", 0)
        if option == "--force-regen":
            # Like pytest-regressions: the new baseline has not been reviewed yet.
            pytest.fail(
                f"regenerated {shown(path)} (--force-regen); review it, commit it, and run again\n"
                f"{moved}",
                pytrace=False,
            )


class SaturationCheck(Check):
    """Compares a profile with its baseline (the fixture `saturation_baseline`)."""

    kind = "saturation"

    def check(self, profile: MeasuredProfile | SaturationProfile | StoredProfile) -> None:
        """Fail the test if the profile has drifted from its baseline.

        Args:
            profile: `cascade_profile`, of which only as many tokens as needed are measured; or a
                profile from `cascade.analyze`.
        """
        from cascade.core.run_folder import is_stored

        __tracebackhide__ = True
        with one_line():
            path = self._path(profile)
        if self._regeneration is not None:
            # What ships with the package is not written to.
            path = self.settings.baselines / path.parent.name / path.name
        with self._noted(path) as option:
            if option is not None:
                self._regenerate(profile, path, option)
                return
            if not is_stored(path):
                self._fail_missing(path)
            record, worst = self._compare(profile, path)
        self._judge(record, worst, path)

    def _path(self, profile: MeasuredProfile | SaturationProfile | StoredProfile) -> Path:
        if isinstance(profile, MeasuredProfile):
            return profile.path
        about = profile.record().provenance
        names = {"model": known(about.model.name), "corpus": about.corpus.name}
        return self.settings.find_baseline(self.kind, **names)

    def _compare(
        self, profile: MeasuredProfile | SaturationProfile | StoredProfile, path: Path
    ) -> tuple[ComparisonRecord, str]:
        """Return the comparison, and its worst cell in words."""
        from cascade.gate.baselines import read_profile
        from cascade.gate.drift import compare

        if isinstance(profile, MeasuredProfile):
            options = saturation_options(self.item, self.settings)
            gate = profile.gate(tokens=options.tokens, full=options.full)
            comparison, record = gate.comparison, gate.record()
        else:
            comparison = compare(profile, read_profile(path))
            record = comparison.record()
        worst = "none"
        if comparison.decoding is not None and comparison.decoding.verdict == "FAIL":
            where = record.attribution and record.attribution.layer
            return record, f"decoding{f' layer {where}' if where else ''}"
        long = comparison.long_context
        if long is not None and long.moved:
            first = long.moved[0]
            return record, f"positions {first.first} to {first.last} layer {first.layer}"
        for cell in comparison.worst()[:1]:
            worst = (
                f"layer {cell.layer} {cell.statistic} {cell.difference:+.1e} "
                f"({cell.standardized:+.2g} x its limit)"
            )
        return record, worst

    def _add(self, record: ComparisonRecord, path: Path) -> None:
        name = f"{path.parent.name}/{path.name.removesuffix('.saturation.json')}"
        where, origin = self.settings.name_of(path), self.settings.origin()
        self.findings.comparisons.append(
            NamedComparison.of(record, name=name, path=where, remote=origin)
        )

    def _add_nothing(self, path: Path, reason: str) -> None:
        self._add(nothing_compared(reason), path)

    def _judge(self, record: ComparisonRecord, worst: str, path: Path) -> None:
        from cascade.report.gate.terminal import print_comparison

        self._add(record, path)
        verdict = record.verdict
        self._add_properties(verdict, worst, record.tokens)
        strict = saturation_options(self.item, self.settings).strict
        if verdict == "PASS" or (verdict == "INCONCLUSIVE" and not strict):
            return
        if verdict == "NOT COMPARABLE":
            pytest.fail(printable(self._not_comparable(record, path)), pytrace=False)
        lines = [drawn(print_comparison, record), *self._at_exit_layer(record)]
        lines += ["", *self._remedies(path)]
        pytest.fail("\n".join(lines), pytrace=False)

    def _not_comparable(self, record: ComparisonRecord, path: Path) -> str:
        """Return in one line what differs, and how to compare anyway."""
        differs = "; ".join(
            f"expected {entry.name} {_short(entry.expected)}, got {_short(entry.obtained)} "
            f"({entry.remedy})"
            for entry in record.mismatches
        )
        made = self.settings.command("analyze", "--output", "RUN")
        return (
            f"{record.verdict}: {differs}; to see what moved, run `{made}` and `cascade compare RUN"
            f" {shown(path)} --anyway`, then `{self.settings.accept_command()}`"
        )

    def _at_exit_layer(self, record: ComparisonRecord) -> Iterator[str]:
        """Yield a line that says whether the exit layer of the product has moved."""
        for row in record.profile:
            if row.layer == str(self.settings.exit_layer):
                moved = any(
                    cell.verdict == "FAIL" for cell in record.cells if cell.layer == row.layer
                )
                what = "has moved; calibrate its threshold again" if moved else "has not moved"
                yield (
                    f"Exit layer {row.layer} {what} (mean similarity expected "
                    f"{_number(row.expected)}, obtained {_number(row.obtained)})"
                )

    def _remedies(self, path: Path) -> Iterator[str]:
        folder = self.settings.baselines
        # A baseline that ships with the package is found without the option.
        baselines = ("--baselines", self.settings.place) if folder in path.parents else ()
        closer = self.settings.command("gate", *baselines, "--full", "--output", "report")
        yield f"To inspect: {closer}"
        made = self.settings.command("analyze", "--output", "RUN")
        yield f"To accept an intended change: {made} && {self.settings.accept_command()}"

    def _regenerate(
        self,
        profile: MeasuredProfile | SaturationProfile | StoredProfile,
        path: Path,
        option: str,
    ) -> None:
        from cascade.gate.accepting import store_profile
        from cascade.gate.baselines import read_profile
        from cascade.gate.drift import compare
        from cascade.gate.remeasuring import still_holds
        from cascade.report.gate.terminal import print_comparison

        before = None
        with contextlib.suppress(RecordError):  # missing, torn or newer: regenerate it
            before = read_profile(path)
        new = profile.whole(before) if isinstance(profile, MeasuredProfile) else profile
        if option == "--force-regen" and before is not None and still_holds(new, before):
            self._judge(compare(new, before).record(), "none", path)
            return
        store_profile(self.settings.baselines, new, path=path)
        if isinstance(profile, MeasuredProfile):
            profile.forget()
        moved = ""
        if before is not None:
            against = compare(new, before, anyway=True).record()
            moved = "Compared with the previous baseline:\n" + drawn(print_comparison, against)
        self._regenerated(path, option, moved)


def nothing_compared(reason: str) -> ComparisonRecord:
    """Return a NOT COMPARABLE record of kind `comparison` with its reason.

    Args:
        reason: Why nothing was compared; several lines are joined.
    """
    from cascade.gate.comparison import Comparison

    headline = " ".join(reason.splitlines())
    return msgspec.structs.replace(Comparison(None).record(), headline=headline)


def _short(value: str | None) -> str:
    """Return a value that fits on a line, with hashes cut to their first digits."""
    text = str(value)
    return f"{text[:19]}..." if text.startswith("sha256:") else text


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6f}"
