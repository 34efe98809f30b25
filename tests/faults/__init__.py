"""The fault rig: commands of netapply, stopped or failed at each of their system calls, on the real kernel.

A case has a namespace with foreign rules, an old state and a new one. A command runs in a forked child under ptrace(2),
and at one of its system calls it is killed, or the call fails, or its answer is changed. After that the next command
runs, and what the kernel then holds must be the old state or the new one, with every foreign object as it was.

    python -m tests.faults            every case, and the table of docs/reliability.md
    tests/test_faults.py              a sample of each
"""
