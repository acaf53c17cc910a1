"""Workers as processes of their own, for tests."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

from fdg_keras import sockets

ROOT = pathlib.Path(__file__).resolve().parent.parent
#: Neither GPUs nor many lines.
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k != "TF_CONFIG"},
    "CUDA_VISIBLE_DEVICES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "PYTHONPATH": str(ROOT),
    # A crash says where.
    "PYTHONFAULTHANDLER": "1",
}


class Workers:
    """So many workers on loopback; use it as a context manager.

    Args:
        count: How many.
    """

    def __init__(self, count):
        self.addresses = [
            f"127.0.0.1:{sockets.free_port()}" for _ in range(count)
        ]
        self.processes = [None] * count
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [
            pathlib.Path(self._folder.name) / str(task) for task in range(count)
        ]

    def start(self):
        """Starts those that do not run."""
        for task, process in enumerate(self.processes):
            if process is None or process.poll() is not None:
                with self._outputs[task].open("w") as output:
                    self.processes[task] = subprocess.Popen(
                        [
                            *(sys.executable, "-m", "fdg_keras.worker"),
                            *("--cluster", ",".join(self.addresses)),
                            *("--task", str(task)),
                        ],
                        env=ENVIRONMENT,
                        stdout=output,
                        stderr=subprocess.DEVNULL,
                    )

    def end(self):
        """Ends them, those too that are stopped; returns their exit codes."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGCONT)
        return [process.wait(20) for process in self.processes]

    def kill(self, task):
        """Kills one, and waits until it is gone."""
        self.processes[task].kill()
        self.processes[task].wait(20)

    def output(self, task):
        """What one has printed."""
        return self._outputs[task].read_text()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait(20)
        self._folder.cleanup()
