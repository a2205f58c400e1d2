"""WHAT runs: capture, coupled channels, width spaces, surgery, and the ONNX file of every network in a space.

Read in this order: ``capture`` (a model becomes a ``Network``), ``ids``, ``rules``, ``rules_shape`` and
``dependencies`` (which channels belong together), ``widths`` (``WidthSpace``), ``surgery`` (``shrink``), ``onnx_build``
(``OnnxTemplate``), ``model_folder``; ``kernel`` is what a runtime makes of it. Importing this package loads nothing.
"""
