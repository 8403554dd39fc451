"""Where a backup lies: see `tallymark_runtime.objects`."""

from tallymark_runtime.objects import ArrowTarget, FolderTarget, Target, Writer, open_target

__all__ = ["ArrowTarget", "FolderTarget", "Target", "Writer", "open_target"]
