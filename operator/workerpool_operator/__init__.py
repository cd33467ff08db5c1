"""The operator: one pass that observes, decides, acts and reports.

Decisions are pure functions (no I/O, no clock), such as ``scaling.decide``. The pass is ``reconcile``; it reaches the world
through the protocols in ``ports``. Adapters, which never import one another, are ``kube``, ``broker`` and ``local``. Entry points
are ``main`` (kopf, in a cluster), ``dev`` (one laptop), ``explain`` and ``cli``. ARCHITECTURE.md lists every module.
"""
