"""The operator: one pass that observes, decides, acts and reports.

Values and decisions (no I/O, no clock): ``model``, ``observation``, ``scaling``, ``sharing``, ``reaping``, ``status``,
``deployment``. The pass: ``reconcile``, behind the small ports of ``ports``. Adapters, which never import one another:
``kube``, ``broker``, ``local``. Ways in: ``main`` (kopf), ``dev`` (one laptop), ``cli``.
"""
