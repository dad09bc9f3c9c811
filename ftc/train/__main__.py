"""`python -m ftc.train --job.config_file run.toml`: torchtitan's own launch, for one process also without torchrun."""

import os
import sys
import threading


def _end_with_parent() -> None:
    """End this process when the launcher is gone: it holds the other end of stdin."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(143)

    if os.environ.get("FTC_LAUNCHED") == "1":
        threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    from ftc.train.processes import end_process
    from ftc.train.trainer import main

    end_process(main(sys.argv[1:]))
