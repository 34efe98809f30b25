"""The conformance suite: does a backend mean what the plan says? Shown by packets, for any backend, on any kernel.

    netapply conform --backend NAME --level core

Cases are data (`netapply.conformance.cases`), the prober sends their flows (`netapply.conformance.prober`), one runner
does the rest (`netapply.conformance.runner`). See docs/conformance.md.
"""
