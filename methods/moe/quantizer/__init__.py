"""The MoE quantizer that CAMERA-Q, GPTQ, RTN and MC share."""
