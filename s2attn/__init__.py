"""s2attn: exact attention that reads only the keys it needs."""
