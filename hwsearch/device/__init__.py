"""WHERE a network runs: device files, the agent beside the runtime, the stopwatch and the machine-wide timing lock.

``hwsearch.device.spec`` says what a device is, ``hwsearch.device.session.open_session`` talks to one, and
``hwsearch.device.check.check_device`` says whether it is quiet enough to be measured. Importing this package loads
nothing: the agent runs on small boards.
"""
