"""What a run of shardlaunch prints of the task, as a callback."""

import json
import time

from shardlaunch import Callback, Event, main_only


class Clock(Callback):
    """When the first step began, and the last one ended."""

    def on_start(self, event: Event) -> None:
        self.begun = time.perf_counter()

    def after_update(self, event: Event) -> None:
        self.ended = time.perf_counter()

    @main_only
    def on_evaluation(self, event: Event) -> None:
        accuracy = event.metrics["eval/accuracy"]
        print(json.dumps({"training_s": self.ended - self.begun, "accuracy": accuracy}), flush=True)
