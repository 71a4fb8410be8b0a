"""Which jobs of a sweep are missing: told by their folders, so that one that has ended is not even composed."""

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from downslope.runs.result import read_result
from downslope.sweeps.job import ENDED, KEY, check_identity, job_key
from downslope.sweeps.name import job_name

NAME = "${job_name:${hydra.job.override_dirname}}"


def missing_jobs(config: DictConfig) -> list[list[str]]:
    """Returns the overrides of each job of a grid that has not ended in the sweep's folder.

    Args:
        config: As Hydra's multirun has it.

    Raises:
        ValueError: The folder holds one of the jobs with another configuration.
    """
    swept = [f"{key}={values}" for key, values in (config.hydra.sweeper.get("params") or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*swept, *config.hydra.overrides.task])
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    if OmegaConf.to_container(config.hydra.sweep)["subdir"] != NAME:  # type: ignore[call-overload,index]
        return jobs  # named by the user: each is composed, and kept when its turn comes
    folder, sources = Path(config.hydra.sweep.dir), sources_digest(config)
    return [job for job in jobs if not _ended(folder / job_name(",".join(sorted(job))), job, config, sources)]


def _ended(folder: Path, overrides: Sequence[str], config: DictConfig, sources: str) -> bool:
    """Tells whether a job has ended, after making sure that it is the same job."""
    if not folder.is_dir():
        return False
    key, file = job_key(sources, overrides), folder / KEY
    if not (file.is_file() and file.read_text() == key):
        check_identity(GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides)), folder)
        if file.parent.is_dir():
            file.write_text(key)
    result = read_result(folder)
    return result is not None and result.status in ENDED


def sources_digest(config: DictConfig) -> str:
    """Returns a digest of every file that a configuration may be composed from, and of the primary one's name."""
    digest = hashlib.sha256(str(config.hydra.job.config_name).encode())
    for source in config.hydra.runtime.config_sources:
        if source.schema != "structured":
            folder = Path(str(files(source.path)) if source.schema == "pkg" else source.path)
            for file in sorted(folder.rglob("*.yaml")):
                digest.update(f"\n{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()
