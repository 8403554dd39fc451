"""Generated from the .proto files of `libs/runtime/proto`; `make proto` renews it."""
