"""Peers' options → capture plans. Pure: what must be looked up is given as facts."""
