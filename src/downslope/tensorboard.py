"""TensorBoard's events, straight into the run's folder."""

from lightning.pytorch.loggers import TensorBoardLogger


class TensorBoard(TensorBoardLogger):
    """Lightning's logger without what a run's folder has no use for: subfolders, a -1 metric, an empty hparams.yaml.

    Args:
        save_dir: The run's folder.
        flush_secs: Seconds after which events reach the disk; nothing waits for them.
    """

    def __init__(self, save_dir: str, flush_secs: float = 5.0) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False, flush_secs=flush_secs)

    def save(self) -> None:
        """Leaves the writing to the writer's own thread: Lightning calls this after every metric."""
