"""Networks of evaluation: plain functions of a parameter dict, and where their weights come from.

resize     the ways in which reference implementations resize         inception  FID's Inception v3
weights    packages and official files -> parameters                  i3d        Kinetics-400 I3D, of FVD and KVD
encoders   DINOv2, CLIP and the shipped ViT, of lumos_jax.encoders    vgg        VGG16 and AlexNet, LPIPS
                                                                      dreamsim   DreamSim, of PIC
"""
