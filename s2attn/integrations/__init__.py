"""Hosts: how models of other libraries come to use s2attn. Each host is a package of its own; what all of them share is `spec`."""
