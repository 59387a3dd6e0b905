"""The same as a request router of Ray Serve's. It lives in the process that sends the requests."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from nautilus.serve.scale.routes import Routes


class PrefixRouter(RequestRouter):
    """For calls of a Replica whose first argument is a Job: `answer`, and others that take no time."""

    def initialize_state(self) -> None:
        self.routes = Routes()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        job, names = pending_request.args[0], {name_of(one): one for one in candidate_replicas}
        if pending_request.metadata.call_method != "answer":
            return [[names[name]] for name in self.routes.nearest(job, [*names])]
        id = pending_request.metadata.internal_request_id
        # One that is given up before it was sent never completes.
        pending_request.future.add_done_callback(lambda sent: self.routes.ended(id) if sent.cancelled() else None)
        return [[names[name]] for name in self.routes.choose(id, job, [*names])]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result) -> None:
        if pending_request.metadata.call_method == "answer":
            id = pending_request.metadata.internal_request_id
            self.routes.sent(id, pending_request.args[0], replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self.routes.ended(internal_request_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self.routes.keep({name_of(one) for one in replicas})


def name_of(replica: RunningReplica) -> str:
    return replica.replica_id.unique_id
