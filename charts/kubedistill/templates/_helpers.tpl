{{- define "kubedistill.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "kubedistill.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "kubedistill.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "kubedistill.selectorLabels" -}}
app.kubernetes.io/name: {{ include "kubedistill.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "kubedistill.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "kubedistill.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "kubedistill.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "kubedistill.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is needed when serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The reference of an image. Arguments: its values, the chart's appVersion. */}}
{{- define "kubedistill.image" -}}
{{- $image := index . 0 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default (index . 1) $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Environment of operator.settings; a setting that has a value of its own is refused. */}}
{{- define "kubedistill.settings" -}}
{{- $own := dict
  "BIND_ADDRESS" "operator.bindToPodIP"
  "HEALTH_PORT" "operator.healthPort"
  "LEADER_ELECTION" "operator.leaderElection"
  "LEASE_NAME" "fullnameOverride"
  "LOG_LEVEL" "operator.logLevel"
  "NAMESPACE" "the release's namespace"
  "TRAINER_ENV" "trainerEnv"
  "TRAINER_IMAGE" "trainerImage"
  "TRAINER_IMAGE_PULL_POLICY" "trainerImage.pullPolicy"
  "WATCH_NAMESPACES" "watchNamespaces" -}}
{{- range $key, $value := .Values.operator.settings }}
{{- $name := $key | snakecase | upper }}
{{- if hasKey $own $name }}
{{- fail (printf "operator.settings.%s: set %s instead" $key (get $own $name)) }}
{{- end }}
- name: KUBEDISTILL_{{ $name }}
  value: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
{{- end }}
{{- end -}}

{{/* JSON: trainerEnv, whose numbers become texts. */}}
{{- define "kubedistill.trainerEnv" -}}
{{- $env := dict -}}
{{- range $name, $value := .Values.trainerEnv -}}
{{- $_ := set $env $name (kindIs "string" $value | ternary $value (toJson $value)) -}}
{{- end -}}
{{- toJson $env -}}
{{- end -}}

{{/* What the operator may do in a namespace that it looks after: kubedistill_operator/rbac.py. */}}
{{- define "kubedistill.rules" -}}
- apiGroups: [kubedistill.dev]
  resources: [distillationjobs]
  # Create and patch: jobs of a chain's stages, and their suspension. Delete: ttlSecondsAfterFinished.
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [kubedistill.dev]
  resources: [distillationchains]
  verbs: [get, list, watch]
- apiGroups: [kubedistill.dev]
  resources: [distillationjobs/status, distillationchains/status]
  verbs: [patch]
# Owner references with blockOwnerDeletion need this where the admission plugin
# OwnerReferencesPermissionEnforcement is on, as on OpenShift.
- apiGroups: [kubedistill.dev]
  resources: [distillationjobs/finalizers, distillationchains/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  # Patch: labels that somebody took off. Delete: pods that a Job left behind as orphans.
  verbs: [get, list, watch, patch, delete]
# The phase of a pod whose node is lost and cannot say so.
- apiGroups: [""]
  resources: [pods/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [services]
  # Patch: a selector that somebody changed.
  verbs: [get, create, patch]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, create, delete]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end -}}
