"""What the four methods share: data, metrics, CRF, backbones, runtime. It knows no method."""
