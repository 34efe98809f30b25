"""iptables-nft: the tables of iptables, kept in nf_tables."""

from netapply_iptables_nft.backend import BACKEND

__all__ = ["BACKEND"]
