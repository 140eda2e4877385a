"""A short form of the campaign on hosts that are namespaces of this machine: python -m tests.faults.hosts."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.host_runs import ROOT
from tests.faults.hosts import ADDRESSES, CONFIGS, Campaign
from tests.launch.hosts import hosts_of, why_not

REASON = why_not()
ON_HOSTS = pytest.mark.skipif(bool(REASON), reason=f"no hosts can be made here: {REASON}")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, hf_home: Path) -> Iterator[Campaign]:
    with hosts_of(ADDRESSES) as hosts:
        yield Campaign(tmp_path_factory.mktemp("hosts"), hosts, hf_home)


@ON_HOSTS
def test_a_configuration_started_to_the_letter_of_its_comment(campaign: Campaign) -> None:
    (config,) = (config for config in CONFIGS if config.stem == "fsdp2")
    assert campaign.configured(config, forks=True) == ""


@ON_HOSTS
def test_unequal_hosts_with_caches_of_their_own(campaign: Campaign) -> None:
    assert campaign.uneven("fsdp2", 1, 2, 1) == ""


@ON_HOSTS
def test_replicas_of_the_model_on_unequal_hosts(campaign: Campaign) -> None:
    assert campaign.uneven("hsdp", 4, 2) == ""


@ON_HOSTS
@pytest.mark.parametrize("kind", ["own", "read-only"])
def test_a_host_that_does_not_share_the_output_folder(kind: str, campaign: Campaign) -> None:
    assert campaign.not_shared((1, 2), 1, kind=kind) == ""


@ON_HOSTS
def test_host_names_of_loopback(campaign: Campaign) -> None:
    assert campaign.loopback_names() == ""


@ON_HOSTS
def test_a_host_without_the_data(campaign: Campaign) -> None:
    assert campaign.no_data() == ""


def test_the_comments_of_all_configurations_are_alike() -> None:
    """So that what holds for one that is started holds for all."""
    lines = [config.read_text().splitlines()[2] for config in CONFIGS]
    assert lines == [
        f"#   accelerate launch --config_file {config.relative_to(ROOT)} --machine_rank 0 recipes/bert_imdb.py"
        for config in CONFIGS
    ]
    assert len(lines) == 8


@pytest.mark.skipif(bool(REASON) or shutil.which("setpriv") is None, reason="needs setpriv, and rights to give up")
@pytest.mark.parametrize("right", ["sys_admin", "net_admin"])
def test_what_forbids_hosts_is_said(right: str) -> None:
    words = [sys.executable, "-c", "from tests.launch.hosts import why_not; print(why_not())"]
    limited = ["setpriv", "--bounding-set", f"-{right}", "--inh-caps", f"-{right}", *words]
    done = subprocess.run(limited, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("namespaces are not allowed: ")
