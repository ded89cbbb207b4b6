"""
The files that an export carries, so that transformers loads it without this package (trust_remote_code=True). They import
nothing of it; scripts/export.py copies them into the exported folder.
"""
