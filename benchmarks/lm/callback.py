"""What a run of shardlaunch prints of its speed, as a callback."""

import sizes

from shardlaunch import Callback, Event, main_only


class Speed(Callback):
    """Tokens per second."""

    def on_start(self, event: Event) -> None:
        self.clock = sizes.Clock()

    def after_update(self, event: Event) -> None:
        self.clock.step_ended()

    @main_only
    def on_end(self, event: Event) -> None:
        self.clock.tell()
