"""The native nftables dialect: one table `inet netapply`, in one batch."""

from __future__ import annotations

from netapply_nftables.backend import Nftables

__all__ = ["BACKEND", "Nftables"]

BACKEND = Nftables()
