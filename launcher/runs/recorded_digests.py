"""Digests that a run has recorded, compared with those of its checkpoints."""

from shardlaunch.checkpoints.listing import listed_digests, read_listing
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.checkpoints.records import DIGESTS
from shardlaunch.checkpoints.state_digests import digests_of_state
from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.tracking import METRICS_FILE, recorded_digests
from shardlaunch.sharding.strategy import Strategy


def check_recorded(checkpoint: Checkpoint, strategy: Strategy, *, peers: Peers) -> None:
    """Compare a state that was loaded with what its run has recorded of that step. All ranks.

    Weights and average are those that the strategy holds now; the optimizer's are the checkpoint's. Raises UserError on
    all ranks where they differ: the run would go on from something else than it had computed.
    """
    loaded = digests_of_state(strategy.state(), peers)

    def check() -> None:
        run_dir = checkpoint.step_dir.parent.parent
        recorded = recorded_digests(run_dir).get(checkpoint.step, {})
        weights, optimizer, average = DIGESTS
        held = {name: loaded[name] for name in (weights, average) if name in loaded}
        found = {**listed_digests(read_listing(checkpoint.step_dir)), **held}
        for what, name in (("weights", weights), ("optimizer's state", optimizer), ("average", average)):
            if name in recorded and name in found and found[name] != recorded[name]:
                raise UserError(
                    f"{checkpoint.step_dir}: the digest of the {what} loaded is {found[name]}, but "
                    f"{run_dir / METRICS_FILE} has {recorded[name]} of step {checkpoint.step}: the run would go on "
                    f"from something else than it had computed. Delete it to go on from an older one (`shardlaunch "
                    f"ckpt verify {run_dir}` compares all), or go on without comparing: --digest-every 0"
                )

    peers.together(lambda: check() if peers.rank == 0 else None)
