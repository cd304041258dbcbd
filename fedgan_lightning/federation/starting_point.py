"""Where a client's module starts beside what the server sends and the client keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import lightning as L
from torch import Tensor

from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.states import Kind


@dataclass(frozen=True)
class StartingPoint:
    """Default values of entries that neither the server nor the client's saved state provides.

    Attributes:
        initial: Entries of the state dict.
        passing: Buffers outside the state dict, so that none passes from one client to the next.
    """

    initial: Mapping[str, Tensor]
    passing: Mapping[str, Tensor]

    @classmethod
    def of(cls, client: L.LightningModule, policy: Policy, *, constants: bool = False) -> StartingPoint:
        """Return the starting point of clients that are copies of ``client``.

        Args:
            client: The copy.
            policy: What travels and what stays.
            constants: Whether entries that nobody trains are needed, too: a stack has them once per client.
        """
        state = client.state_dict()
        kinds = [kind for kind in Kind if kind is not Kind.CONSTANT]
        stays = {*policy.private, *policy.names(Kind.COUNTER, sync=("average", "served"))}
        stays |= {*policy.names(*kinds, sync="server")} & state.keys()  # of what does not travel, clients have a copy
        stays |= {*policy.constants} if constants else set()
        initial = {name: state[name].detach().clone() for name in stays}
        passing = {n: b.detach().clone() for n, b in client.named_buffers() if n not in state}
        return cls(initial=initial, passing=passing)
