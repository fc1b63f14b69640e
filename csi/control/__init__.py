"""How the processes of one node talk: JSON messages with file descriptors over Unix SEQPACKET sockets.

Standard library only, because the keeper imports it. A message is one datagram, so there is no framing to get
wrong; bulk bytes (manifests, trees) travel as memfds beside the message, never inside it.
"""
