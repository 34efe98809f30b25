"""`make bench`: what an apply costs beside the kernel's own share of it and beside the tools that are exec'd for it.

    measure      interleaved rounds, medians, spread
    places       throwaway namespaces, many at a time
    recording    what a backend sends to the kernel, kept as bytes
    replay       the same bytes again over kept sockets: the floor, and the floor with a look before it
    subjects     the ways to bring a namespace to a plan, all with the same rules
    operations, fleet, lists, dataplane, coldstart     what is measured
    report       tables, JSON, and which bars are met

Everything happens in namespaces of its own, with its own xtables lock and state directory, below /dev/shm.
"""
