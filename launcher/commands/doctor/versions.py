"""Versions of Python and of the packages that runs use."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from shutil import which

from shardlaunch.launcher.commands.doctor.findings import Finding, note, ok, problem

NAME = "shardlaunch"
SHOWN = ("torch", "transformers", "accelerate", "datasets", "deepspeed")
# What of it works here is known of one version, whose insides are used.
TESTED = {"deepspeed": "0.19.8"}
# Packages with parts compiled for one version of torch, which fail to import beside another.
_FOR_ONE_TORCH = ("torchvision", "torchaudio", "torchtext")
Versions = Mapping[str, str]


def check_python(version: Sequence[int], requires: str) -> list[Finding]:
    """Return whether this Python is one that the package is for. `requires` is such as >=3.11."""
    from packaging.specifiers import SpecifierSet

    text = ".".join(map(str, version))
    if requires and not SpecifierSet(requires).contains(text, prereleases=True):
        return [problem(f"Python {text}; {NAME} needs {requires}", "use another Python")]
    return [ok(f"Python {text}, {sys.executable}")]


def check_requirements(requires: Iterable[str], installed: Versions) -> list[Finding]:
    """Return which packages are missing, or not of the versions that are asked for.

    `requires` are lines as of a package's metadata; of extras, what is installed is checked.
    """
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion

    findings = []
    for text in requires:
        wanted = Requirement(text)
        found = installed.get(canonical(wanted.name))
        is_extra = wanted.marker is not None and "extra" in str(wanted.marker)
        if found is None:
            if not is_extra and (wanted.marker is None or wanted.marker.evaluate()):
                findings.append(
                    problem(f"{wanted.name} is not installed", f'pip install "{wanted.name}{wanted.specifier}"')
                )
            continue
        try:
            is_fine = wanted.specifier.contains(found, prereleases=True)
        except InvalidVersion:
            is_fine = True
        if not is_fine:
            findings.append(
                problem(
                    f"{wanted.name} {found}, but {wanted.specifier} is needed",
                    f'pip install "{wanted.name}{wanted.specifier}"',
                )
            )
    return findings


def check_pairs(installed: Versions, requires_of: Callable[[str], Sequence[str]]) -> list[Finding]:
    """Return packages that do not work beside each other. `requires_of` gives the requirements of a package."""
    from packaging.requirements import Requirement

    findings = []
    torch = installed.get("torch", "")
    for name in _FOR_ONE_TORCH:
        if name not in installed:
            continue
        wanted = next((one for text in requires_of(name) if (one := Requirement(text)).name == "torch"), None)
        build, torch_build = (version.partition("+")[2] for version in (installed[name], torch))
        if wanted is not None and not wanted.specifier.contains(torch, prereleases=True):
            why = f"is compiled for torch{wanted.specifier}, and torch is {torch}"
        elif "cpu" in (build, torch_build) and build != torch_build:
            why = f"and torch {torch} are builds for different devices"
        else:
            continue
        findings.append(
            problem(
                f"{name} {installed[name]} {why}: transformers and datasets fail when they import it",
                f"install the {name} of this torch, or pip uninstall {name}, which {NAME} does not need",
            )
        )
    for name, tested in TESTED.items():
        if installed.get(name, tested).partition("+")[0] != tested:
            findings.append(
                note(
                    f"{name} {installed[name]}: {NAME} uses its insides, which are known for {tested}",
                    f'pip install "{name}=={tested}", or compare: {NAME} parity RECIPE --strategies zero1 zero2 zero3',
                )
            )
    return findings


def check_copies(names: Iterable[str]) -> list[Finding]:
    """Return packages that are installed more than once in one folder, of which either may be imported."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    return [
        problem(
            f"{name}: two versions are recorded in one folder, as after an upgrade that broke off",
            f"pip install --force-reinstall {name}",
        )
        for name in twice
    ]


def check_compiler(user: str) -> list[Finding]:
    """Return whether there is a compiler, for an option that compiles code of its own."""
    if any(which(name) for name in ("g++", "c++", "clang++")):
        return []
    return [problem(f"{user} compiles C++, and there is no compiler", "install g++, or leave the option out")]


def check_versions() -> list[Finding]:
    """Return the findings on what is installed here."""
    recorded = [
        (canonical(one.name), one.version, str(one.locate_file(""))) for one in metadata.distributions() if one.name
    ]
    installed = {name: version for name, version, _ in reversed(recorded)}  # the first on the path counts
    findings = []
    try:
        ours = metadata.metadata(NAME)
        findings += check_python(sys.version_info[:3], ours["Requires-Python"] or "")
        findings += check_requirements(metadata.requires(NAME) or [], installed)
    except metadata.PackageNotFoundError:
        findings.append(note(f"{NAME} is not installed: the versions that it needs are not known", "pip install ."))
    findings += check_pairs(installed, lambda name: metadata.requires(name) or [])
    places = Counter((name, place) for name, _, place in recorded)
    findings += check_copies([name for (name, _), count in places.items() for _ in range(count) if count > 1])
    shown = ", ".join(f"{name} {installed[name]}" for name in SHOWN if name in installed)
    return [*findings, ok(shown)]


def canonical(name: str) -> str:
    """Return a package's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()
