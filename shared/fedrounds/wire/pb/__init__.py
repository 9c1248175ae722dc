"""Generated from protos/fed/v1/federation.proto by scripts/gen_protos; not edited by hand."""
