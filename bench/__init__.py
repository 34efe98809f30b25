"""`make bench`: what an apply costs beside the kernel's own share of it and beside the tools that are exec'd for it.

    measure      turns, medians, spread
    places       throwaway namespaces, many at a time
    plans        what is applied
    recording    what a backend sends to the kernel, kept as bytes
    replay       the same bytes again over kept sockets: the floor
    programs     starting one
    subjects     all ways to bring a namespace to a plan, with the same rules
    operations, fleet, lists, dataplane, coldstart     what is measured
    figures, bars, report     all of it, what was asked for, and how it is told

Everything happens in namespaces of its own, with its own xtables lock and state directory, below /dev/shm.
"""
