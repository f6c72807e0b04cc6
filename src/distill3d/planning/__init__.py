"""Memory, network rows, arithmetic and time of a run before it starts: nothing is downloaded and no weights are made.

`plan` takes steps of the program's own loop. What is large in them, the networks and the renderer, is measured once by
itself (`measure`): networks of true size on tensors without values, the renderer with values but at few pixels. In the
loop a stand-in then has the same memory, and gives gray images and zeros.
"""
