"""Did a change of the code change a bit? Twelve commands on two checkouts: every weight and every scalar, compared.

python scripts/laboratory/frozen.py HEAD~1            this working tree against a commit
python scripts/laboratory/frozen.py HEAD~1 --only adam
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
SHORT = ["trainer.max_epochs=12", "device=cpu", "callbacks.gradient_monitor.every_n_steps=1"]
COMMANDS = {
    "automatic": [SHORT],
    "manual": [["model=manual", *SHORT]],
    "momentum": [["optimizer=momentum", *SHORT]],
    "adam": [["optimizer=adam", "scheduler=warmup_cosine", *SHORT]],
    "adamw": [["optimizer=adamw", "scheduler=cosine", *SHORT]],
    "lbfgs": [["optimizer=lbfgs", "lr=0.1", "data.batch_size=1000", *SHORT]],
    "plateau": [["scheduler=plateau", "scheduler.scheduler.patience=0", "lr=0.2", *SHORT]],
    "accumulation": [["+trainer.accumulate_grad_batches=4", *SHORT]],
    "clipping": [["+trainer.gradient_clip_val=0.3", "data=synthetic", "data.num_features=5", *SHORT]],
    "diverging": [["experiment=diverge", "device=cpu"]],
    "sweep": [["-m", "lr=0.001,0.1", "optimizer=sgd,adam", *SHORT]],
    "resume": [SHORT, ["resume=run", "resume_override=[trainer.max_epochs]", "trainer.max_epochs=20"]],
}


def run(checkout: Path, folder: Path, name: str) -> Path:
    """Runs a command of one checkout, and returns the folder that it leaves."""
    where = folder / name.replace(" ", "-")
    where.mkdir(parents=True)
    for arguments in COMMANDS[name]:
        target = [] if any(each.startswith("resume=") for each in arguments) else ["hydra.run.dir=run"]
        target = ["hydra.sweep.dir=run"] if "-m" in arguments else target
        process = subprocess.run(
            [sys.executable, str(checkout / "scripts" / "train.py"), *arguments, *target],
            cwd=where,
            env={**os.environ, "PYTHONPATH": str(checkout / "src")},
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode not in (0, 3):
            raise SystemExit(f"{name}: exit code {process.returncode} in {checkout}\n{process.stdout}{process.stderr}")
    return where / "run"


def contents(run: Path) -> dict[str, Any]:
    """Every weight and every scalar below a folder, by name."""
    found: dict[str, Any] = {}
    for file in sorted(run.rglob("*.ckpt")):
        state = torch.load(file, weights_only=True)["state_dict"]
        found |= {f"{file.relative_to(run)}: {name}": tensor for name, tensor in state.items()}
    for folder in sorted({file.parent for file in run.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            values = [(event.step, event.value) for event in events.Scalars(tag)]
            found[f"{folder.relative_to(run)}: {tag}"] = torch.tensor(values, dtype=torch.float64)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not the same, in words."""
    lines = [f"only before: {name}" for name in before if name not in after]
    lines += [f"only after: {name}" for name in after if name not in before]
    for name in before:
        if name in after and not torch.equal(*(each[name].nan_to_num(nan=7e77) for each in (before, after))):
            lines.append(f"another value: {name}")
    return lines


def main() -> None:
    """Compares, prints what differs, and leaves with 1 where anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a commit, or the folder of a checkout")
    parser.add_argument("--only", choices=COMMANDS, nargs="+", default=list(COMMANDS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, before = Path(name), Path(arguments.before)
        if not before.is_dir():
            before = folder / "checkout"
            command = ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach"]
            subprocess.run([*command, str(before), arguments.before], check=True)
        try:
            different = 0
            for each in arguments.only:
                with ThreadPoolExecutor() as pool:
                    sides = {"before": before, "after": ROOT}
                    runs = [pool.submit(run, checkout, folder / side, each) for side, checkout in sides.items()]
                    old, new = (contents(future.result()) for future in runs)
                found = differences(old, new)
                different += bool(found)
                print(f"{each:<14}{len(old):>4} compared  {'the same bits' if not found else ''}", flush=True)
                for line in found:
                    print(f"    {line}")
        finally:
            if before == folder / "checkout":
                subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(before)], check=True)
    sys.exit(int(different > 0))


if __name__ == "__main__":
    main()
