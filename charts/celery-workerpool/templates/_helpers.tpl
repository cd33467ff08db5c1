{{- define "celery-workerpool.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "celery-workerpool.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "celery-workerpool.name" .) }}
{{- end }}

{{- define "celery-workerpool.image" -}}
{{ .Values.image.repository }}
{{- with .Values.image.digest }}@{{ . }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "celery-workerpool.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "celery-workerpool.labels" -}}
{{ include "celery-workerpool.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "celery-workerpool.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "celery-workerpool.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "celery-workerpool.rules" -}}
- apiGroups: [workerpool.dev]
  resources: [workerpools]
  verbs: [list, watch]
- apiGroups: [workerpool.dev]
  resources: [workerpools/status]
  verbs: [patch]
- apiGroups: [workerpool.dev]
  resources: [workerpools/finalizers]  # some clusters ask for it before a WorkerPool may own a Deployment
  verbs: [update]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [deployments/scale]
  verbs: [patch]
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]  # another autoscaler on a tier is named, and not fought
  verbs: [list, watch]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, patch]
- apiGroups: [""]
  resources: [secrets]
  verbs: [get]
  {{- with .Values.brokerSecrets }}
  resourceNames: {{ toJson . }}
  {{- end }}
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end }}
